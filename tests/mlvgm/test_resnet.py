"""The ResNet classifiers: blocks against the formula, and parity with the official modules at full size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlvgm.resnet import Bottleneck, ResNetClassifier, read_resnet50, read_resnext50
from tests import reference
from tests.mlvgm import small

FIXTURE = Path(__file__).parent / "fixtures" / "resnet.npz"
READERS = {"resnet50": (read_resnet50, 1), "resnext50": (read_resnext50, 32)}


@pytest.mark.parametrize("family", READERS)
def test_outputs_stay_as_recorded(family: str, tmp_path: Path) -> None:
    # Recorded when the code matched the official modules at full size; made by tests/mlvgm/fixtures/record.py.
    read, groups = READERS[family]
    classifier = read(small.save(small.resnet(groups), tmp_path), 3)
    with np.load(FIXTURE) as expected:
        assert reference.relative_error(classifier(small.images(family, 2, 64)), expected[family]) < 1e-5


def plain_block(x: Tensor, values: dict[str, Tensor], stride: int, groups: int) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            values[f"{name}.{leaf}"].view(1, -1, 1, 1) for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    out = norm(torch.einsum("oi,bihw->bohw", values["conv1.weight"][:, :, 0, 0], x), "bn1").clamp(min=0)
    parts = zip(out.chunk(groups, dim=1), values["conv2.weight"].chunk(groups), strict=True)
    out = torch.cat([F.conv2d(part, weight, stride=stride, padding=1) for part, weight in parts], dim=1)
    out = norm(out, "bn2").clamp(min=0)
    out = norm(torch.einsum("oi,bihw->bohw", values["conv3.weight"][:, :, 0, 0], out), "bn3")
    shortcut = x
    if "downsample.0.weight" in values:
        x = x[:, :, ::stride, ::stride]
        shortcut = norm(torch.einsum("oi,bihw->bohw", values["downsample.0.weight"][:, :, 0, 0], x), "downsample.1")
    return (out + shortcut).clamp(min=0)


@pytest.mark.parametrize(("inputs", "stride", "groups"), [(16, 1, 1), (24, 2, 1), (24, 1, 4), (16, 2, 4)])
def test_block_matches_formula(inputs: int, stride: int, groups: int) -> None:
    block = Bottleneck(inputs, 8, 16, stride, groups)
    block.load_state_dict(small.weights(block))
    block.eval().requires_grad_(False)
    values = {key: value.double() for key, value in block.state_dict().items()}
    x = small.draw("features", (2, inputs, 6, 4))
    assert reference.relative_error(block(x), plain_block(x.double(), values, stride, groups)) < 2e-6


def test_head_matches_formula() -> None:
    classifier = ResNetClassifier(3, stem=8).eval().requires_grad_(False)
    classifier.load_state_dict(small.weights(classifier))
    values = {key.removeprefix("model.fc."): value.double() for key, value in classifier.state_dict().items()}
    images = small.images("head", 2, 64)
    features = classifier.model.features(2 * images - 1)
    assert features.shape == (2, 256)
    hidden = features.double() @ values["0.weight"].T
    hidden = (hidden - values["1.running_mean"]) / torch.sqrt(values["1.running_var"] + 1e-5)
    hidden = (hidden * values["1.weight"] + values["1.bias"]).clamp(min=0)
    expected = hidden @ values["3.weight"].T + values["3.bias"]
    assert reference.relative_error(classifier(images), expected) < 2e-6


def test_published_shapes() -> None:
    with torch.device("meta"):
        resnet, resnext = ResNetClassifier(2), ResNetClassifier(4, groups=32)
    assert sum(p.numel() for p in resnet.parameters()) == 27_710_530
    assert sum(p.numel() for p in resnext.parameters()) == 27_186_500


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "read", "n_classes"), [("resnet50_gender", read_resnet50, 2), ("resnext50_cars", read_resnext50, 4)]
)
@torch.no_grad()
def test_parity_with_the_official_modules(
    name: str, read: Callable[[Path, int], ResNetClassifier], n_classes: int
) -> None:
    classifier = read(reference.checkpoint(name), n_classes)
    expected = reference.outputs(f"{name}_seed1")
    images = torch.from_numpy(expected["images_u8"].astype(np.float32) / np.float32(255))
    features = classifier.model.features(2 * images - 1)
    assert reference.relative_error(features, expected["features"]) < 1e-4
    assert reference.relative_error(classifier.model.fc[0](features), expected["projected"]) < 1e-4
    assert reference.relative_error(classifier(images), expected["logits"]) < 1e-4
