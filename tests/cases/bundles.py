"""Bundles that were altered, through handlers.pipeline.Pipeline.load and one answer.

    PYTHONPATH=. python tests/cases/bundles.py [BUNDLE]      (default: build/road-signs)

A bundle is what its manifest lists, each file with its SHA-256. Whatever is wrong with one is told as a BundleError,
before any engine is loaded.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from handlers.manifest import BundleError, FileDigest
from handlers.pipeline import Pipeline

SOURCE = Path(*sys.argv[1:] or ["build/road-signs"])
MANIFEST = json.loads((SOURCE / "pipeline.json").read_text())
RUNTIMES = ("onnxruntime", "openvino")
faults = 0


def say(name: str, good: bool, wanted: str, got: str) -> None:
    global faults
    faults += not good
    print(f"ok    {name}" if good else f"FAULT {name}: wanted {wanted}, got {' '.join(got.split())[:170]}", flush=True)


def load(folder: Path, runtime: str) -> str | Exception:
    try:
        with Pipeline.load(folder, runtime, threads=1) as pipeline:
            return pipeline.manifest.classes[
                pipeline.run(np.zeros((1, *pipeline.manifest.image_size, 3), np.uint8), samples=1, seeds=[1]).labels[0]
            ]
    except Exception as error:
        return error


def variant(files: Callable[[Path], object] | None = None, text: Callable[[str], str | bytes] | None = None) -> Path:
    """A copy of the bundle with other ``files``, or with another ``text`` of its manifest."""
    folder = Path(tempfile.mkdtemp(dir=SCRATCH)) / "bundle"
    shutil.copytree(SOURCE, folder)
    if files:
        files(folder)
    if text:
        changed = text((folder / "pipeline.json").read_text())
        (folder / "pipeline.json").write_bytes(
            changed if isinstance(changed, bytes) else changed.encode("utf-8", "surrogatepass")
        )
    return folder


def loads(name: str, folder: Path) -> None:
    for runtime in RUNTIMES:
        got = load(folder, runtime)
        if not isinstance(got, str):
            return say(name, False, f"an answer of {runtime}", f"{type(got).__name__}: {got}")
    return say(name, True, "", "")


def refused(name: str, folder: Path, *words: str) -> None:
    """A BundleError with one of ``words`` in it, if there are any."""
    for runtime in RUNTIMES:
        got = load(folder, runtime)
        shown = (
            f"an answer of {runtime}"
            if isinstance(got, str)
            else f"{type(got).__name__}: {str(got).replace(str(folder), '')}"
        )
        if not isinstance(got, BundleError) or (words and not any(word in str(got) for word in words)):
            return say(name, False, f"a BundleError{' that says ' + ' or '.join(words) if words else ''}", shown)
    return say(name, True, "", "")


def external(listed: bool) -> Callable[[Path], object]:
    """Put the weights of ``classify`` into a file of their own, which the manifest lists or not."""

    def change(folder: Path) -> None:
        model, name = onnx.load(folder / "classify.onnx"), "classify.onnx.data"
        (folder / "classify.onnx").unlink()
        onnx.save(model, folder / "classify.onnx", save_as_external_data=True, location=name, size_threshold=1024)
        assert (folder / name).stat().st_size > 100_000
        manifest = json.loads((folder / "pipeline.json").read_text())
        names = ["classify.onnx", name] if listed else ["classify.onnx"]
        manifest["files"] |= {each: vars(FileDigest.of(folder / each)) for each in names}
        (folder / "pipeline.json").write_text(json.dumps(manifest))

    return change


def flip(name: str) -> Callable[[Path], object]:
    """Change one byte in the middle of a file."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return change


def entry(**changes: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | changes)


def file_named(name: str) -> Callable[[str], str]:
    return entry(files=MANIFEST["files"] | {name: {"sha256": "0" * 64, "bytes": 1}})


with tempfile.TemporaryDirectory() as scratch:
    SCRATCH = Path(scratch)
    loads("control: as it was exported", variant())
    loads("control: weights in a file of their own, listed", variant(external(listed=True)))
    refused("control: a byte of a listed file is another", variant(flip("classify.onnx")), "SHA-256")
    refused("control: a file is missing", variant(lambda folder: (folder / "encode.onnx").unlink()), "missing")
    refused("control: a file outside the bundle", variant(text=file_named("../own.onnx")), "outside")
    refused(
        "control: NaN among the weights of a schedule",
        variant(text=entry(alphas={"linear": [float("nan")] * len(MANIFEST["noise_shapes"])})),
        "alphas",
    )
    refused("control: the manifest is cut off", variant(text=lambda text: text[: len(text) // 2]), "JSON")

    # What is not listed has no seal: whoever can write there decides what is loaded.
    refused("weights in a file that is not listed", variant(external(listed=False)), "classify.onnx.data")
    altered = variant(external(listed=False))
    flip("classify.onnx.data")(altered)
    refused("the same, one byte of it another", altered, "classify.onnx.data")

    # Two entries of one name: a reader that takes the last one and a person who reads the first see different bundles.
    twice = lambda key, value: lambda text: text.rstrip().removesuffix("}") + f', "{key}": {json.dumps(value)}}}'  # noqa: E731
    refused("samples are there twice", variant(text=twice("samples", {"default": 1, "max": 99})), "samples")
    refused("files are there twice", variant(text=twice("files", MANIFEST["files"])), "files")
    inner = lambda text: text.replace('"default":', '"default": 1, "default":', 1)  # noqa: E731
    refused("a name twice within an entry", variant(text=inner), "default")

    # Whatever the reader of JSON or the file system makes of it, the user gets one line.
    refused(
        "a number of 5,000 digits", variant(text=lambda text: text.replace('"format": 1', '"format": ' + "1" * 5000))
    )
    refused(
        "100,000 lists in one another",
        variant(
            text=lambda text: text.replace('"report": {', '"report": {"a": ' + "[" * 100_000 + "]" * 100_000 + ",", 1)
        ),
    )
    refused("a file name with a NUL", variant(text=file_named("a\0b")))
    refused("a file name of half a character", variant(text=file_named("\ud800")))
    refused("control: a manifest in UTF-16", variant(text=lambda text: text.encode("utf-16")))
sys.exit(1 if faults else 0)
