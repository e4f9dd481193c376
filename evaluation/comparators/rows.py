"""Trained comparators as defences: rows of `mlvgm evaluate`, computed in PyTorch, since no bundle holds them."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluation import defences
from evaluation.adaptive import Trace
from evaluation.attacks import to_float
from evaluation.comparators.autoencoders import draw, read
from evaluation.comparators.training import ComparatorError
from evaluation.defences import Defence, Predictions, Seeds, Subject
from export.compare import ReferenceEngine
from export.fold import fast
from handlers.arrays import Pixels
from mlvgm.checkpoint import read_checkpoint, weights_digest
from mlvgm.load import load_classifier
from mlvgm.purifier import Autoencoder

CLASSIFIERS: Mapping[str, str] = {
    "pgd": "adversarially trained (PGD)",
    "trades": "adversarially trained (TRADES)",
    "another": "classifier of another seed",
    "smoothed": "trained on noisy images",
}
AUTOENCODERS: Mapping[str, str] = {"avae": "A-VAE", "ndvae": "ND-VAE"}
BEHIND = "served-"
"""What the name of a classifier's row begins with where it stands behind the purifier."""
SAMPLES = 8
"""Of an autoencoder, that vote."""


def comparators(subject: Subject, folder: Path, samples: int | str | None, served: str | None) -> dict[str, Defence]:
    """The rows, by name, of the files in ``folder`` that `evaluation.comparators` has trained; not all need be there.

    A classifier has two: alone, and behind the purifier. Attackers who know the classifier alone know that of the row.

    Args:
        samples, served: as for `evaluation.defences.defences`.

    Raises:
        ComparatorError: the folder has none, or they are for images of another size.
        CheckpointError: a file cannot be used, or has another number of classes.
    """
    classes, rows = len(subject.pipeline.manifest.classes), dict[str, Defence]()
    for name, title in CLASSIFIERS.items():
        if (file := folder / f"{name}.safetensors").is_file():
            rows |= classifier(subject, name, title, load_classifier("vgg11", file, classes), samples, served)
    for name, title in AUTOENCODERS.items():
        if (file := folder / f"{name}.safetensors").is_file():
            rows[name] = autoencoder(subject, name, title, read(name, file))
    if not rows:
        names = ", ".join((*CLASSIFIERS, *AUTOENCODERS))
        raise ComparatorError(f"{folder}: holds no comparator NAME.safetensors, of the names {names}")
    return rows


def training(folder: Path) -> dict[str, Any]:
    """How each of the files in ``folder`` was trained, by name, for a report; and its SHA-256."""
    found = {}
    for name in (*CLASSIFIERS, *AUTOENCODERS):
        if (file := folder / f"{name}.safetensors").is_file():
            about = read_checkpoint(file).get("about")
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[name] = {**(about if isinstance(about, dict) else {}), "sha256": digest}
    return found


def classifier(
    subject: Subject, name: str, title: str, network: nn.Module, samples: int | str | None, served: str | None
) -> dict[str, Defence]:
    """Two rows: ``network`` in the place of the classifier, alone and behind the purifier."""
    spec = subject.pipeline.manifest.stages[-1]
    pipeline = subject.pipeline.with_stage(spec.name, ReferenceEngine(spec, network))
    rows = defences.defences(dataclasses.replace(subject, pipeline=pipeline, classifier=network), samples, served)
    own: dict[str, Any] = {"classifier": network, "digest": weights_digest(network)}
    alone = dataclasses.replace(rows["none"], name=name, title=title, **own)
    both = f"{rows['served'].title}, {title}"
    behind = dataclasses.replace(rows["served"], name=BEHIND + name, title=both, **own)
    return {alone.name: alone, behind.name: behind}


def autoencoder(subject: Subject, name: str, title: str, network: Autoencoder) -> Defence:
    """One row: the classifier behind ``network``, whose samples vote."""
    side, (height, width) = network.image_size, subject.pipeline.manifest.image_size
    if not side == height == width:
        raise ComparatorError(f"{title} is for images of {side}x{side} pixels, the bundle for {height}x{width}")
    sizes, quick = [math.prod(shape) for shape in network.noise_shapes], fast(network, subject.device)

    @torch.no_grad()
    def serve(images: Pixels, seeds: Seeds) -> Predictions:
        clean, purified = to_float(images), []
        for sample in range(SAMPLES):
            drawn = torch.from_numpy(defences.normal((sum(sizes),), [seed + (sample << 40) for seed in seeds]))
            noise = [
                part.view(-1, *shape)
                for part, shape in zip(drawn.split(sizes, dim=1), network.noise_shapes, strict=True)
            ]
            purified.append(network.purify(clean, noise).images.clamp(0, 1).numpy())
        logits = [subject.pipeline.classify(some) for some in purified]
        spread = np.stack(purified).std(axis=0).mean(axis=(1, 2, 3))
        return Predictions.of(np.stack(logits, axis=1), subject.pipeline.classify(images), spread)

    def forward(images: Tensor, draws: int) -> Trace:
        repeated = images.to(subject.device).repeat(draws, 1, 1, 1)
        purified = quick.purify(repeated, draw(network, len(repeated), subject.device))
        changed = purified.images.clamp(0, 1)
        stages = {"decode": purified.mixed, "classify": (changed,)}
        return Trace(subject.fast_classifier(changed).view(draws, len(images), -1).cpu(), stages)

    return Defence(name, f"{title}, vote of {SAMPLES}", serve, forward, True, digest=weights_digest(network))
