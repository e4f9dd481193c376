"""`mlvgm purify` on folders with one odd file, cut off in the middle, and beside another job.

    python tests/cases/bulk_purify.py      (from the project's root; needs build/road-signs; about a minute; Linux)

The rule that the verb itself gives: what is good is written, what is not is named, and work that was cut off goes on
where it stopped.
"""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, os.getcwd())

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

from handlers.manifest import FileDigest

SIDE = 32
faults = 0


def say(name: str, good: bool, wanted: str, got: object) -> None:
    global faults
    faults += not good
    print(
        f"ok    {name}" if good else f"FAULT {name}: wanted {wanted}, got {' '.join(str(got).split())[:190]}",
        flush=True,
    )


def overflowing(folder: Path) -> Path:
    """The bundle, but that its first stage gives NaN for an image that is white all over."""
    shutil.copytree("build/road-signs", folder)
    model = onnx.load(folder / "encode.onnx")
    graph, first = model.graph, model.graph.output[0].name
    for node in graph.node:
        node.output[:] = ["own_clean" if name == first else name for name in node.output]
        node.input[:] = ["own_clean" if name == first else name for name in node.input]
    numbers = {"own_one": np.float32(1), "own_zero": np.float32(0), "own_shape": np.array([-1, 1, 1, 1])}
    graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in numbers.items())
    steps = [
        ("Flatten", ["images"], "own_flat"),
        ("ReduceMin", ["own_flat", "own_axis"], "own_darkest"),
        ("Sub", ["own_one", "own_darkest"], "own_gap"),
        ("Div", ["own_zero", "own_gap"], "own_poison"),  # 0 / 0
        ("Reshape", ["own_poison", "own_shape"], "own_column"),
        ("Add", ["own_clean", "own_column"], first),
    ]
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "own_axis"))
    graph.node.extend(helper.make_node(kind, inputs, [output]) for kind, inputs, output in steps)
    onnx.save(model, folder / "encode.onnx")
    manifest = json.loads((folder / "pipeline.json").read_text())
    manifest["files"]["encode.onnx"] = vars(FileDigest.of(folder / "encode.onnx"))
    (folder / "pipeline.json").write_text(json.dumps(manifest))
    return folder


def signs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return folder


def start(
    given: Path, out: Path, bundle: Path, *options: str, limit_gb: int = 0, **streams: object
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "mlvgm", "purify", str(given), "--bundle", str(bundle), "--out", str(out)]
    command += ["--samples", "1", "--runtime", "onnxruntime", *options]
    limit = (lambda: resource.setrlimit(resource.RLIMIT_AS, (limit_gb << 30,) * 2)) if limit_gb else None
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=limit, **streams)


def purify(*words: object, seconds: float = 60, **how: object) -> tuple[int | None, str]:
    """Exit code, or None when it does not end in time, and what was said."""
    process = start(*words, stdout=subprocess.DEVNULL, **how)
    try:
        said = process.communicate(timeout=seconds)[1]
        return process.returncode, said
    except subprocess.TimeoutExpired:
        process.kill()
        return None, "no end: " + process.communicate()[1]


def one_odd(name: str, folder: Path, out: Path, odd: str, good: int, bundle: Path, **how: object) -> None:
    """All ``good`` images are written, ``odd`` is named in the one error, and the exit code is 1; twice."""
    for turn in ("", ", once more"):
        code, said = purify(folder, out, bundle, **how)
        written = len(list(out.glob("*.png")))
        right = (code, written) == (1, good) and odd in said and "Traceback" not in said
        last = (said.strip().splitlines() or [""])[-1]
        say(name + turn, right, f"exit code 1, {good} PNGs, {odd} named", f"exit code {code}, {written} PNGs: {last}")


def several_jobs(folder: Path, out: Path, bundle: Path, jobs: int) -> None:
    """Either one refuses to begin, or all share the work; no image gets two answers that differ."""
    running = [start(folder, out, bundle, "--json", stdout=(out.parent / f"answers{i}").open("w")) for i in range(jobs)]
    said = [process.communicate(timeout=1500)[1] for process in running]
    codes = [process.returncode for process in running]
    failed = [words.strip().splitlines()[-1] for words, code in zip(said, codes, strict=True) if code]
    clean = 0 in codes and all(words.startswith("mlvgm purify: ") and "Errno" not in words for words in failed)
    say(
        "two jobs on one folder: they end in order",
        clean,
        "exit code 0, or one line that tells of the other job",
        failed,
    )
    found: dict[str, set[str]] = {}
    for i in range(jobs):
        for line in (out.parent / f"answers{i}").read_text().splitlines():
            found.setdefault(json.loads(line)["file"], set()).add(line)
    several = sum(len(each) > 1 for each in found.values())
    good = len(found) == len(list(folder.iterdir())) and not several
    got = f"{len(found)} images answered, {several} of them with two answers that differ"
    say("two jobs on one folder: one answer an image", good, "one for each", got)


def example(folder: Path, bundle: Path, out: Path, answers: Path) -> str:
    """The line that --help shows, with our folders."""
    help_ = subprocess.run([sys.executable, "-m", "mlvgm", "purify", "--help"], capture_output=True, text=True).stdout
    line = re.search(r"Example: mlvgm (purify .*)", " ".join(help_.split()))[1]
    ours = {"signs/": folder, "build/road-signs": bundle, "purified": out, "answers.jsonl": answers}
    for theirs, own in ours.items():
        assert theirs in line, f"the example of --help has changed: {line}"
        line = line.replace(theirs, shlex.quote(str(own)))
    return f"exec {sys.executable} -m mlvgm {line}"


def cut_off(folder: Path, bundle: Path, out: Path) -> None:
    answers, total = out.parent / "answers.jsonl", len(list(folder.iterdir()))
    line = example(folder, bundle, out, answers)
    process = subprocess.Popen(line, shell=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.png"))) < total // 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = len(list(out.glob("*.png")))
    code = subprocess.run(line, shell=True, stderr=subprocess.DEVNULL, timeout=1500).returncode
    files = [json.loads(line)["file"] for line in answers.read_text().splitlines() if line.endswith("}")]
    pngs = sorted(out.glob("*.png"))
    whole = sum(Image.open(png).size == (SIDE, SIDE) and bool(Image.open(png).load()) for png in pngs)
    ended = code, len(pngs), whole
    say("control: killed and started again, all PNGs", ended == (0, total, total), f"0 and {total} whole PNGs", ended)
    every = sorted(files) == sorted(str(file) for file in folder.iterdir())
    got = f"{len(set(files))} after a kill at {before} PNGs"
    say("killed and started again with the line of --help, all answers", every, f"one for each of {total} images", got)


with tempfile.TemporaryDirectory() as scratch:
    root, bundle = Path(scratch), Path("build/road-signs")
    damaged = signs(root / "damaged", 20)
    (damaged / "0005x.png").write_bytes(b"no picture")
    one_odd("control: a damaged file", damaged, root / "out1", "0005x.png", 20, bundle)
    white = signs(root / "white", 20)
    Image.new("RGB", (SIDE, SIDE), "white").save(white / "0005x.png")
    one_odd(
        "an image on which a stage overflows", white, root / "out2", "0005x.png", 20, overflowing(root / "overflowing")
    )
    huge = signs(root / "huge", 20)
    with (huge / "0005x.png").open("wb") as sparse:
        sparse.truncate(30 << 30)
    one_odd("a file of 30 GB, with 8 GB of memory", huge, root / "out3", "0005x.png", 20, bundle, limit_gb=8)
    os.mkfifo(root / "pipe.png")
    code, said = purify(root / "pipe.png", root / "out4", bundle, seconds=20)
    named = code in (1, 2) and "pipe.png" in said and "Traceback" not in said
    say("a named pipe in the place of a file", named, "an error that names it", f"exit code {code}: {said}")
    many = signs(root / "many", 400)
    several_jobs(many, root / "out5", bundle, 2)
    cut_off(many, bundle, root / "out6")
sys.exit(1 if faults else 0)
