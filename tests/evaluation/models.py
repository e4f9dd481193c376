"""The small classifiers that attacks are tried on, and the shipped model where its weights are there."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from mlvgm.load import Default, load_default
from mlvgm.recipe import ROOT

if TYPE_CHECKING:
    from evaluation.defences import Defence, Subject
    from evaluation.threats import Target


class Linear(nn.Module):
    """Logits that are linear in the image: the distance to every decision boundary is known."""

    def __init__(self, weights: NDArray[np.float32], centre: float = 0.5) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.from_numpy(weights), requires_grad=False)
        self.centre = centre

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.centre).flatten(1) @ self.weights


def linear(classes: int = 3, side: int = 8, seed: int = 0) -> Linear:
    """A random linear classifier of (B, 3, side, side)."""
    shape = (3 * side * side, classes)
    return Linear(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def of_bundle(folder: Path) -> Linear:
    """The classifier in PyTorch of a tiny bundle."""
    model = onnx.load(folder / "classify.onnx")
    weights = {tensor.name: numpy_helper.to_array(tensor, str(folder)) for tensor in model.graph.initializer}
    return Linear(weights["w"].astype(np.float32).copy())


def pictures(count: int, side: int = 8, seed: int = 0) -> NDArray[np.uint8]:
    """Random pictures away from black and white, (count, side, side, 3)."""
    return np.random.default_rng(seed).integers(80, 176, (count, side, side, 3), np.uint8)


def shipped() -> Default:
    """The default model; skips the test where its weights are not there yet."""
    folder = ROOT / "model_store" / "road-signs"
    if not all((folder / name).is_file() for name in ("classifier.safetensors", "nvae.safetensors")):
        pytest.skip("the weights of the default model are not here")
    return load_default()


def target_of(subject: "Subject", defence: "Defence", count: int = 12) -> "Target":
    """Pictures, the first two of which are misread from the start."""
    from evaluation.attacks import predict
    from evaluation.threats import Target

    images = pictures(count)
    labels = predict(subject.classifier, images)
    labels[:2] = (labels[:2] + 1) % 3
    return Target(subject, defence, images, labels)
