"""The main job, start to end: export the default model, archive it, serve it, and read attacked signs right again.

    python -m benchmarks.demo        (or: make demo)

A dozen signs are drawn, each is attacked through the classifier, and both pictures of it go over HTTP to the server.
Writes build/demo.json and the contact sheet build/demo.png.
"""

import argparse
import io
import json
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import machine
from benchmarks.attacks import attack
from benchmarks.contact_sheet import Row, draw_sheet
from benchmarks.signs import draw_signs
from cli.main import main as mlvgm
from cli.server import Server
from mlvgm.load import load_default
from mlvgm.recipe import ROOT

RECIPE = "road-signs"
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Reading:
    """What the server said of one sign."""

    name: str
    true: int
    clean: dict[str, Any]
    attacked: dict[str, Any]
    pictures: tuple[Pixels, Pixels, Pixels]
    l2: float

    def figures(self) -> dict[str, Any]:
        """Class indices; ``clean`` and ``attacked`` are the bare classifier's, ``purified`` that of the attacked."""
        return {
            "name": self.name,
            "true": self.true,
            "clean": self.clean["unpurified"]["index"],
            "clean_purified": self.clean["index"],
            "attacked": self.attacked["unpurified"]["index"],
            "purified": self.attacked["index"],
            "agreement": self.attacked["agreement"],
            "flagged": self.attacked["flagged"],
            "l2": round(self.l2, 4),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every step. Returns 0 when all of them went through, whatever the signs were read as."""
    args = _parser().parse_args(arguments)
    begun = time.monotonic()

    def step(line: str) -> None:
        print(f"\n[{time.monotonic() - begun:5.1f} s] {line}", flush=True)

    bundle, store = args.build / RECIPE, args.build / "demo"
    step(f"exporting {RECIPE} to {bundle}")
    if code := mlvgm(["export", "--recipe", RECIPE, "--out", str(bundle)]):
        return code
    step(f"packing {bundle} into {store}")
    store.mkdir(parents=True, exist_ok=True)
    if code := mlvgm(["archive", str(bundle), "--out", str(store)]):
        return code
    step("drawing a dozen signs, and attacking the classifier with each (DeepFool, L2)")
    signs, default = draw_signs(), load_default(RECIPE)
    images = np.stack([sign.image for sign in signs])
    labels = np.array([sign.label for sign in signs])
    result = attack(default.classifier, images, labels, "deepfool")
    server = Server(args.port or _free_ports(), args.build / "serve")
    step(f"starting TorchServe on {server.url}, keys required")
    try:
        server.start([store / f"{RECIPE}.mar"])
        step("asking it about every sign, clean and attacked")
        client = server.client()
        readings = []
        for sign, attacked, l2 in zip(signs, result.images, result.l2, strict=True):
            answers = [client.predict(_png(picture), RECIPE) for picture in (sign.image, attacked)]
            purified, _ = client.purify(_png(attacked), RECIPE)
            pictures = (sign.image, attacked, np.asarray(Image.open(io.BytesIO(purified)).convert("RGB")))
            readings.append(Reading(sign.name, sign.label, answers[0], answers[1], pictures, float(l2)))
    finally:
        server.stop()
    step("stopped the server")
    classes = default.recipe.classes
    print(table(readings, classes))
    write(readings, classes, args.build, time.monotonic() - begun)
    print(summary(readings))
    print(f"\nPictures: {args.build / 'demo.png'}   figures: {args.build / 'demo.json'}")
    return 0


def table(readings: Sequence[Reading], classes: Sequence[str]) -> str:
    """One line per sign: what the bare classifier and the purifier make of its two pictures."""
    width = max(len(name) for name in (*(r.name for r in readings), "attacked, purified")) + 2
    heads = ("sign", "clean", "attacked", "attacked, purified")
    lines = ["".join(f"{head:{width}}" for head in heads) + "agreement  flagged"]
    for reading in readings:
        figures = reading.figures()
        cells = [reading.name]
        for key in ("clean", "attacked", "purified"):
            mark = " " if figures[key] == reading.true else "!"
            cells.append(f"{mark}{classes[figures[key]]}")
        row = "".join(f"{cell[: width - 1]:{width}}" for cell in cells)
        lines.append(f"{row}{figures['agreement']:>9.0%}  {'yes' if figures['flagged'] else 'no'}")
    return "\n".join([*lines, "(! marks a wrong answer)"])


def summary(readings: Sequence[Reading]) -> str:
    """How many were read rightly, and what became of the stop sign, said as it is."""
    figures = [reading.figures() for reading in readings]
    counts = {key: sum(f[key] == f["true"] for f in figures) for key in ("clean", "attacked", "purified")}
    lines = [
        f"{len(figures)} signs: {counts['clean']} read rightly when clean, {counts['attacked']} when attacked, "
        f"{counts['purified']} when attacked and purified."
    ]
    stop = next((f for f in figures if f["name"] == "stop"), None)
    if stop and stop["attacked"] != stop["true"]:
        again = "is read as a stop sign again" if stop["purified"] == stop["true"] else "is still misread"
        lines.append(f"The attacked stop sign {again}.")
    return "\n".join(lines)


def write(readings: Sequence[Reading], classes: Sequence[str], folder: Path, seconds: float) -> None:
    """The figures as demo.json and the pictures as demo.png."""
    content = {
        "recipe": RECIPE,
        "attack": "deepfool",
        "seconds": round(seconds, 1),
        "machine": machine.describe(),
        "images": [reading.figures() for reading in readings],
    }
    (folder / "demo.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    rows = [
        Row(
            pictures=reading.pictures,
            answers=[
                (classes[reading.figures()[key]], reading.figures()[key] == reading.true)
                for key in ("clean", "attacked", "purified")
            ],
        )
        for reading in readings
    ]
    draw_sheet(rows).save(folder / "demo.png")


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _free_ports(count: int = 5) -> int:
    """The first of ``count`` free ports in a row: the demo must not collide with a server that is running."""
    for first in range(18080, 60000, 10):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise OSError("no five free ports in a row on 127.0.0.1")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="folder for everything it writes")
    parser.add_argument("--port", type=int, help="of the server (default: a free one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
