"""VGG-11 with batch norm (Simonyan and Zisserman, ICLR 2015, configuration A) and the 3-layer head of the paper."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlvgm.checkpoint import find_weights, load_tensors, read_checkpoint, width

POOL = "pool"
LAYOUT: tuple[int | str, ...] = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)


class VGG11(nn.Module):
    """A classifier of images (B, 3, H, W) in [0, 1]; it normalises by itself and returns logits (B, n_classes).

    Args:
        n_classes: number of classes.
        width: scales the channels of every convolution; 1 in the published files.
        pool: side of the feature map in front of the head; 7 in the published files, where the head's first layer
            alone has (512 * 7 * 7)^2 weights.
    """

    def __init__(self, n_classes: int, width: float = 1.0, pool: int = 7) -> None:
        super().__init__()
        self.pool = pool
        layers: list[nn.Module] = []
        channels = 3
        for item in LAYOUT:
            if isinstance(item, str):
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = int(item * width)
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        d = channels * pool * pool
        self.model: Any = nn.Module()  # holds a place in the published tensor names
        self.model.features = nn.Sequential(*layers)
        self.model.classifier = nn.Sequential(
            nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(), nn.Linear(d, n_classes)
        )

    def features(self, images: Tensor) -> Tensor:
        """What the head sees, (B, d)."""
        maps = self.model.features(2.0 * images - 1.0)
        return F.adaptive_avg_pool2d(maps, self.pool).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.classifier(self.features(images))


def read_vgg11(path: str | Path, n_classes: int) -> VGG11:
    """The classifier of a checkpoint, ready for inference. Width and pool are read off its tensors.

    Raises:
        CheckpointError: the file is no such checkpoint, or has another number of classes.
    """
    tensors = find_weights(read_checkpoint(path), "model.features.0.weight", path)
    first, last = (width(tensors, f"model.features.{i}.weight", 0, n, path) for i, n in ((0, 64), (25, 512)))
    pool = math.isqrt(width(tensors, "model.classifier.0.weight", 0, 512 * 49, path) // last)
    with torch.device("meta"):  # the file's own tensors take the place of these
        classifier = VGG11(n_classes, width=first / 64, pool=max(pool, 1))
    load_tensors(classifier, tensors, path)
    return classifier.eval().requires_grad_(False)
