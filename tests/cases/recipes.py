"""Recipes with the slips of somebody in a hurry, through `mlvgm export`.

    python tests/cases/recipes.py      (from the project's root; about a minute)

Each recipe is right but for one field. It must end with exit code 2 and one line that names the field and what may
stand there, before the first stage is traced.
"""

import copy
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

PROJECT = Path(__file__).resolve().parents[2]
NUMBER = ("number", "integer", "float")
SECONDS = 900  # until a run is ended that neither fails nor begins
RIGHT = {
    "name": "my-signs",
    "family": "nvae",
    "image_size": 32,
    "n_latents": 7,
    "purifier": str(PROJECT / "model_store" / "road-signs" / "nvae.safetensors"),
    "classifier": {"architecture": "onnx", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    "schedule": "tuned",
    "alphas": {"tuned": [0.0, 0.3, 0.3, 0.0, 0.0, 0.0, 0.0]},
    "classes": ["stop", "yield", "other"],
    "batch": {"min": 1, "opt": 2, "max": 4},
    "samples": {"default": 2, "max": 4},
}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT)}
faults = 0


def classifier(file: Path) -> None:
    weight = numpy_helper.from_array(np.zeros((3 * 32 * 32, 3), np.float32), "w")
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", ["N", 3, 32, 32]), ("y", ["N", 3]))
    ]
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


def export(recipe: Path, options: list[str]) -> tuple[int | None, str, bool]:
    """Exit code, what was said to stderr, and whether tracing began (then it is ended)."""
    words = ["-m", "mlvgm", "export", "--recipe", str(recipe), "--out", str(FOLDER / "out"), *options]
    with (FOLDER / "stderr").open("w") as aside:
        process = subprocess.Popen(
            [sys.executable, "-u", *words], stdout=subprocess.PIPE, stderr=aside, env=ENVIRONMENT, text=True
        )
    alarm = threading.Timer(SECONDS, process.kill)
    alarm.start()
    began = False
    for line in process.stdout:
        if "tracing" in line:
            began = True
            process.kill()
    code = process.wait()
    alarm.cancel()
    return code, (FOLDER / "stderr").read_text(), began


def check(name: str, change: Callable[[dict], object] | str, field: str, *allowed: str, file: bool = True) -> None:
    """``change`` the right recipe, or the text of the whole file; the line must have ``field`` and one of ``allowed``.

    Args:
        file: whether --classifier is given.
    """
    global faults
    recipe = copy.deepcopy(RIGHT)
    text = change if isinstance(change, str) else (change(recipe), yaml.safe_dump(recipe, sort_keys=False))[1]
    (FOLDER / "own.yaml").write_text(text)
    code, said, began = export(FOLDER / "own.yaml", OPTIONS if file else [])
    lines = [line for line in said.splitlines() if line.startswith("mlvgm")]
    line = lines[0].replace(str(FOLDER), "") if len(lines) == 1 else ""
    named = field in line and any(word in line.lower() for word in allowed)
    good = code == 2 and not began and "Traceback" not in said and named
    faults += not good
    wanted = f"exit code 2 and one line with {field!r} and {' or '.join(map(repr, allowed))}"
    shown = "the export began" if began else f"exit code {code}: {line or ''.join(said.strip().splitlines()[-1:])}"
    print(f"ok    {name}" if good else f"FAULT {name}: wanted {wanted}, got {shown[:190]}", flush=True)


with tempfile.TemporaryDirectory() as scratch:
    FOLDER = Path(scratch)
    OPTIONS = ["--classifier", str(FOLDER / "own.onnx")]
    classifier(FOLDER / "own.onnx")
    (FOLDER / "own.yaml").write_text(yaml.safe_dump(RIGHT))
    code, said, began = export(FOLDER / "own.yaml", OPTIONS)
    faults += not began
    print(
        "ok    control: the right recipe"
        if began
        else f"FAULT control: wanted an export that begins, got {said[-150:]}"
    )

    check("control: precision: fp8", lambda r: r.update(precision="fp8"), "precision", "fp16")
    check("control: schedule: tuend", lambda r: r.update(schedule="tuend"), "schedule", "tuned")
    check(
        "control: 6 latents for a purifier with 7",
        lambda r: r.update(n_latents=6, alphas={}, schedule="linear"),
        "latents",
        "7",
    )
    check(
        "a typing error in a field's name",
        lambda r: r.update(atenuation=1.0),
        "'atenuation'",
        "attenuation",
        "fields are",
    )
    check("name with a blank", lambda r: r.update(name="My signs"), "name", "letters", "a-z")
    check("family: vae", lambda r: r.update(family="vae"), "family", "nvae")
    check("no family", lambda r: r.pop("family"), "family", "nvae")
    check("image_size: 32x32", lambda r: r.update(image_size="32x32"), "image_size", *NUMBER)
    check("runtime: openvno", lambda r: r.update(runtime="openvno"), "runtime", "openvino")
    check("temperature: warm", lambda r: r.update(temperature="warm"), "temperature", *NUMBER)
    check("batch: 32", lambda r: r.update(batch=32), "batch", "min", "three")
    check("samples: 8", lambda r: r.update(samples=8), "samples", "default", "two")
    check("an old batch", lambda r: r.update(batch=[1, 2, 4]), "batch", "write {min: 1, opt: 2, max: 4}")
    check("old samples", lambda r: r.update(samples=[2, 4]), "samples", "write {default: 2, max: 4}")
    check("an old cpu_batch", lambda r: r.update(cpu_batch=1), "cpu_batch", "batch: {")
    check("samples above their maximum", lambda r: r["samples"].update(default=5), "samples", "default <= max")
    check("samples: atuo", lambda r: r["samples"].update(default="atuo"), "default", "auto")
    check("temperature: nan", lambda r: r.update(temperature=float("nan")), "temperature", *NUMBER)
    check("a class called no", lambda r: r.update(classes=["stop", False]), "classes[1]", "quotes")
    check("a class twice", lambda r: r.update(classes=["stop", "stop"]), "classes", "twice")
    check("alphas: a list without a name", lambda r: r.update(alphas=[0.0] * 7), "alphas", "name", "schedule")
    check("classifier: onnx", lambda r: r.update(classifier="onnx"), "classifier", "architecture")
    for name in ("resnet18", "my_net.build"):
        other = lambda r, name=name: r["classifier"].update(architecture=name)  # noqa: E731
        check(f"control: architecture: {name}, with --classifier", other, name, "module:function")
        check(f"architecture: {name}, without --classifier", other, name, "module:function", file=False)
    check("mean of two numbers", lambda r: r["classifier"].update(mean=[0.5, 0.5]), "mean", "three", "3")
    check("mean of words", lambda r: r["classifier"].update(mean=["a", "b", "c"]), "mean", *NUMBER)
    check(
        "std of 0",
        lambda r: r["classifier"].update(std=[0, 0, 0]),
        "std",
        "positive",
        "above 0",
        "more than 0",
        "greater than 0",
        "not be 0",
        "zero",
    )
    check("an empty file", "", "own.yaml", "empty", "missing", "no recipe")
    check("control: no YAML", "name: [my-signs\n", "own.yaml", "line")
    check("a name twice", "name: a\nname: b\n", "own.yaml", "twice")
    check("a list", "- name\n", "own.yaml", "mapping")
sys.exit(1 if faults else 0)
