"""ResNet-50 (He et al., CVPR 2016) and ResNeXt-50 32x4d (Xie et al., CVPR 2017), with the head of the paper."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mlvgm.checkpoint import find_weights, load_tensors, read_checkpoint, width

BLOCKS = (3, 4, 6, 3)
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 (which carries the stride) and 1x1 convolution around a shortcut."""

    def __init__(self, inputs: int, middle: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    """Backbone and head: normalised images (B, 3, H, W) to logits (B, n_classes)."""

    def __init__(self, n_classes: int, stem: int, groups: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        inputs, stages = stem, []
        for stage, count in enumerate(BLOCKS):
            planes, blocks = stem * 2**stage, []
            middle = planes if groups == 1 else 2 * planes
            for i in range(count):
                stride = 2 if i == 0 and stage > 0 else 1
                blocks.append(Bottleneck(inputs, middle, planes * EXPANSION, stride, groups))
                inputs = planes * EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Sequential(
            nn.Linear(inputs, inputs, bias=False), nn.BatchNorm1d(inputs), nn.ReLU(), nn.Linear(inputs, n_classes)
        )

    def features(self, x: Tensor) -> Tensor:
        """Mean of the last feature map, (B, 32 * stem): what the head reads."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class ResNetClassifier(nn.Module):
    """Classifier of (B, 3, H, W) images in [0, 1], any size; gives logits (B, n_classes).

    Args:
        n_classes: number of classes.
        stem: channels of the first convolution, 64 as published.
        groups: 1 for ResNet, 32 for ResNeXt.
    """

    def __init__(self, n_classes: int, stem: int = 64, groups: int = 1) -> None:
        super().__init__()
        self.model = ResNet(n_classes, stem, groups)

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - 0.5) / 0.5)


def read_resnet50(path: str | Path, n_classes: int) -> ResNetClassifier:
    """ResNet-50 from a checkpoint of the paper: ``state_dict`` with keys ``model.*``.

    Raises:
        CheckpointError: naming the file and the first key that is missing or wrong.
    """
    return _read(path, n_classes, groups=1)


def read_resnext50(path: str | Path, n_classes: int) -> ResNetClassifier:
    """ResNeXt-50 32x4d from a checkpoint of the paper: ``state_dict`` with keys ``model.*``.

    Raises:
        CheckpointError: naming the file and the first key that is missing or wrong.
    """
    return _read(path, n_classes, groups=32)


def _read(path: str | Path, n_classes: int, groups: int) -> ResNetClassifier:
    tensors = find_weights(read_checkpoint(path), "model.conv1.weight", path)
    stem = width(tensors, "model.conv1.weight", 0, 64, path)
    if 2 * stem % groups:
        stem = 64
    with torch.device("meta"):  # the file's own tensors take the place of these
        classifier = ResNetClassifier(n_classes, stem, groups)
    load_tensors(classifier, tensors, path)
    return classifier.eval().requires_grad_(False)
