"""The whole way in three minutes: export the shipped model, serve it, attack drawn road signs, purify them over HTTP.

    python -m benchmarks.demo

Prints what each sign is read as before and after, and writes build/demo.json and build/demo.png.
"""

import argparse
import dataclasses
import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.errors import CliError
from deploy.server import PORTS, Server, port_is_taken
from evaluation import contact_sheet, machine
from evaluation.attacks import CarliniWagner, Method, attack, predict
from evaluation.signs import Sign, draw_signs
from handlers.client import Client, ServerError
from mlvgm.cli.main import main as mlvgm
from mlvgm.load import Default, load_default

RECIPE = "road-signs"
ATTACK: Method = CarliniWagner(searches=4, steps=50, stepsize=0.02, initial_const=0.3)
"""A few images only, so the attack may take more steps than on thousands."""

Pixels = NDArray[np.uint8]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every step. Returns 0 when all of them went through, whatever the signs were read as."""
    args = _parser().parse_args(arguments)
    begun = time.monotonic()

    def say(step: str) -> None:
        print(f"[{time.monotonic() - begun:5.1f} s] {step}", flush=True)

    bundle = args.build / RECIPE
    say(f"Exporting the recipe {RECIPE} to {bundle}")
    if code := mlvgm(["export", "--recipe", RECIPE, "--out", str(bundle)]):
        return code
    say("Packing the archive for TorchServe")
    if code := mlvgm(["archive", str(bundle), "--out", str(args.build / "store")]):
        return code
    say("Drawing road signs, and attacking them through the classifier")
    default, signs = load_default(RECIPE), draw_signs()
    attacked = attack_signs(default, signs)
    server = Server(args.port or _free_port())
    try:
        say(f"Starting TorchServe on port {server.port}")
        server.start([args.build / "store" / f"{RECIPE}.mar"])
        say(f"Asking it about {len(signs)} clean and {len(signs)} attacked signs")
        answers = [ask(server.client(), sign, pixels) for sign, pixels in zip(signs, attacked, strict=True)]
    finally:
        say("Stopping TorchServe")
        server.stop()
    content = summary(default, signs, attacked, answers) | {"seconds": round(time.monotonic() - begun, 1)}
    (args.build / "demo.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_sheet(default, signs, attacked, answers, args.build / "demo.png")
    print("", *table(default, content["images"]), "", *conclusion(default, content), sep="\n")
    say(f"Done: {args.build / 'demo.json'}, {args.build / 'demo.png'}")
    return 0


def attack_signs(default: Default, signs: Sequence[Sign]) -> list[Pixels]:
    """Each sign, changed as little as makes the classifier misread it, uint8 (H, W, 3)."""
    images, labels = np.stack([sign.image for sign in signs]), np.array([sign.label for sign in signs], np.int64)
    return list(attack(default.classifier, images, labels, ATTACK).images)


def ask(client: Client, sign: Sign, attacked: Pixels) -> dict[str, Any]:
    """The server's answers about a sign: "clean", "attacked", and of the latter the purified image, "image"."""
    image, figures = client.purify(_png(attacked), RECIPE)
    with Image.open(io.BytesIO(image)) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return {"clean": client.predict(_png(sign.image), RECIPE), "attacked": figures, "image": pixels}


def summary(
    default: Default, signs: Sequence[Sign], attacked: Sequence[Pixels], answers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What goes into demo.json; classes are numbers."""
    images = []
    for sign, pixels, answer in zip(signs, attacked, answers, strict=True):
        change = (pixels.astype(np.float32) - sign.image) / 255
        images.append(
            {
                "name": sign.name,
                "true": sign.label,
                "clean": answer["clean"]["unpurified"]["index"],
                "clean_purified": answer["clean"]["index"],
                "clean_flagged": answer["clean"]["flagged"],
                "attacked": answer["attacked"]["unpurified"]["index"],
                "purified": answer["attacked"]["index"],
                "agreement": answer["attacked"]["agreement"],
                "flagged": answer["attacked"]["flagged"],
                "l2": round(float(np.linalg.norm(change)), 4),
            }
        )
    eager = predict(default.classifier, np.stack(attacked))
    return {
        "model": RECIPE,
        "attack": {"name": type(ATTACK).__name__, "settings": dataclasses.asdict(ATTACK)},
        "samples": answers[0]["attacked"]["samples"],
        "images": images,
        "counts": {
            "images": len(images),
            "clean": sum(row["clean"] == row["true"] for row in images),
            "clean_purified": sum(row["clean_purified"] == row["true"] for row in images),
            "fooled": sum(row["attacked"] != row["true"] for row in images),
            "purified": sum(row["purified"] == row["true"] for row in images),
            "flagged": sum(row["flagged"] for row in images),
            "clean_flagged": sum(row["clean_flagged"] for row in images),
            "server_agrees_with_eager": sum(
                int(row["attacked"] == label) for row, label in zip(images, eager, strict=True)
            ),
        },
        "timing_ms": answers[0]["clean"]["timing_ms"],
        "machine": machine.describe(),
    }


def table(default: Default, images: Sequence[dict[str, Any]]) -> list[str]:
    """One line per sign, with the names of the classes."""
    names = default.recipe.classes
    width = max(len(row["name"]) for row in images)
    lines = [f"{'sign':{width}}  {'attacked, unpurified':{width}}  {'attacked, purified':{width}}  agree  flagged  L2"]
    for row in images:
        mark = "" if row["purified"] == row["true"] else "  <- not recovered"
        if row["attacked"] == row["true"]:
            mark = "  <- the attack failed"
        lines.append(
            f"{row['name']:{width}}  {names[row['attacked']]:{width}}  {names[row['purified']]:{width}}  "
            f"{row['agreement']:5.0%}  {'yes' if row['flagged'] else 'no':7}  {row['l2']:.2f}{mark}"
        )
    return lines


def conclusion(default: Default, content: dict[str, Any]) -> list[str]:
    """What came out of it, the stop sign first, whichever way it went."""
    names, counts = default.recipe.classes, content["counts"]
    stop = next(row for row in content["images"] if names[row["true"]] == "stop")
    if stop["attacked"] == stop["true"]:
        headline = "The attack on the stop sign failed: it is read as a stop sign even without purification."
    elif stop["purified"] == stop["true"]:
        headline = f'The attacked stop sign is read as "{names[stop["attacked"]]}"; purified, it is a stop sign again.'
    else:
        headline = (
            f'The attacked stop sign is read as "{names[stop["attacked"]]}", and purification did not help this time: '
            f'it is read as "{names[stop["purified"]]}". The noise is drawn afresh each time.'
        )
    return [
        headline,
        f"Of {counts['images']} signs the classifier reads {counts['clean']} rightly when they are clean and "
        f"{counts['images'] - counts['fooled']} when they are attacked; purified, {counts['purified']} of the attacked "
        f"and {counts['clean_purified']} of the clean ones. {counts['flagged']} attacked and {counts['clean_flagged']} "
        "clean signs were flagged.",
    ]


def save_sheet(
    default: Default,
    signs: Sequence[Sign],
    attacked: Sequence[Pixels],
    answers: Sequence[dict[str, Any]],
    path: Path,
) -> None:
    """The pictures of it all."""
    rows = [
        contact_sheet.Row(
            true=sign.name,
            clean=sign.image,
            attacked=pixels,
            purified=answer["image"],
            read_clean=answer["clean"]["unpurified"]["label"],
            read_attacked=answer["attacked"]["unpurified"]["label"],
            read_purified=answer["attacked"]["label"],
        )
        for sign, pixels, answer in zip(signs, attacked, answers, strict=True)
    ]
    title = f"{RECIPE}: {type(ATTACK).__name__} attack, vote of {answers[0]['attacked']['samples']} purified copies"
    contact_sheet.save(rows, title, path)


def _free_port(first: int = 8080) -> int:
    """The first of as many free ones in a row as a server takes."""
    for port in range(first, first + 100 * PORTS, PORTS):
        if not any(port_is_taken(port + i) for i in range(PORTS)):
            return port
    return first  # the server will say what is wrong


def _png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder for everything (%(default)s)")
    parser.add_argument("--port", type=int, help="of the server, four more after it (default: the next five free ones)")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (CliError, ServerError) as error:
        sys.exit(f"demo: {error}")
