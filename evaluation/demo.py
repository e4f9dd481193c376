"""The demo of ``mlvgm demo``: drawn road signs, attacked through the classifier, and the server's answers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import contact_sheet, machine
from evaluation.attacks import CarliniWagner, Method, attack, distances, predict
from evaluation.contact_sheet import Picture
from evaluation.photographs import encode, to_pixels
from evaluation.signs import Sign
from handlers.arrays import Pixels
from handlers.client import Client
from handlers.pipeline import Pipeline
from mlvgm.load import Default

RECIPE = "road-signs"
ATTACK: Method = CarliniWagner(searches=4, steps=50, stepsize=0.02, initial_const=0.3)
"""With more steps than for thousands of images."""

HEADS = ("clean", "attacked", contact_sheet.CHANGE, "what is kept", "sample 1", "sample 2")


def attack_signs(default: Default, signs: Sequence[Sign]) -> list[Pixels]:
    """Each sign with a small perturbation that the classifier misclassifies, uint8 (H, W, 3)."""
    images, labels = np.stack([sign.image for sign in signs]), np.array([sign.label for sign in signs], np.int64)
    return list(attack(default.classifier, images, labels, ATTACK).images)


def save_attacked(signs: Sequence[Sign], attacked: Sequence[Pixels], folder: Path) -> None:
    """Write a PNG of each image, named like its sign."""
    folder.mkdir(parents=True, exist_ok=True)
    for sign, pixels in zip(signs, attacked, strict=True):
        (folder / f"{sign.name.replace(' ', '-')}.png").write_bytes(encode(pixels))


def ask(client: Client, sign: Sign, attacked: Pixels) -> dict[str, Any]:
    """The server's answers for a sign: "clean" and "attacked"."""
    return {"clean": client.predict(encode(sign.image), RECIPE), "attacked": client.predict(encode(attacked), RECIPE)}


def purify(pipeline: Pipeline, attacked: Sequence[Pixels]) -> list[list[Picture]]:
    """For each image what purification keeps of it, and two purified samples, each with its predicted class.

    What is kept is shown by replacing every latent that the served schedule resamples: the rest of the image comes from
    the latents with alpha 0.
    """
    manifest, images = pipeline.manifest, np.stack(attacked)
    whole = [float(alpha > 0) for alpha in manifest.alphas[manifest.default_alphas]]
    seeds = range(len(images))
    kept, samples = pipeline.run(images, 1, seeds, alphas=whole), pipeline.run(images, 2, seeds)
    pixels = to_pixels(np.concatenate([kept.purified, samples.purified], axis=1).transpose(0, 1, 3, 4, 2))
    labels = np.concatenate([kept.sample_labels, samples.sample_labels], axis=1)
    return [
        [Picture(shown, manifest.classes[label]) for shown, label in zip(*row, strict=True)]
        for row in zip(pixels, labels, strict=True)
    ]


def summary(
    default: Default, signs: Sequence[Sign], attacked: Sequence[Pixels], answers: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The content of demo.json; classes are indices."""
    images = []
    changes = distances(np.stack(attacked), np.stack([sign.image for sign in signs]))
    for sign, answer, change in zip(signs, answers, changes, strict=True):
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
                "l2": round(float(change), 4),
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
    """The results in a few sentences, the stop sign first."""
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
    rows = (
        ("clean", counts["clean"], counts["clean_purified"], counts["clean_flagged"]),
        ("attacked", counts["images"] - counts["fooled"], counts["purified"], counts["flagged"]),
    )
    heading = f"read correctly, of {counts['images']} signs"
    lines = [f"{name:28}  {alone:10}  {purified:8}  {flagged:7}" for name, alone, purified, flagged in rows]
    return [headline, "", f"{heading:28}  unpurified  purified  flagged", *lines]


def save_sheet(
    signs: Sequence[Sign],
    attacked: Sequence[Pixels],
    answers: Sequence[dict[str, Any]],
    purified: Sequence[Sequence[Picture]],
    path: Path,
) -> None:
    """Write the contact sheet; ``purified`` is the result of `purify`, and votes are from the server's ``answers``."""
    rows = [
        contact_sheet.SheetRow(
            sign.name,
            [
                Picture(sign.image, answer["clean"]["unpurified"]["label"]),
                Picture(pixels, answer["attacked"]["unpurified"]["label"]),
                contact_sheet.change(sign.image, pixels),
                *pictures,
            ],
            vote=answer["attacked"]["label"],
        )
        for sign, pixels, answer, pictures in zip(signs, attacked, answers, purified, strict=True)
    ]
    counts = sorted({answer["attacked"]["samples"] for answer in answers})
    votes = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    title = f"{RECIPE}: {type(ATTACK).__name__} attack on the classifier; what each is read as; vote of {votes} samples"
    contact_sheet.save(rows, HEADS, title, path)
