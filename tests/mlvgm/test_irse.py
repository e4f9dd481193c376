"""The IR-SE50 backbone: unit by unit against the formula, and the pyramid's taps and sizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlvgm.irse import STAGES, Pyramid, Unit, Widths, widths_like
from tests.mlvgm import small
from tests.reference import relative_error


def plain_norm(x: Tensor, values: dict[str, Tensor], name: str) -> Tensor:
    mean, var, weight, bias = (
        values[f"{name}.{leaf}"].view(1, -1, 1, 1) for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(16, 32, 2), (32, 32, 2), (32, 32, 1)])
def test_unit_matches_formula(inputs: int, outputs: int, stride: int) -> None:
    unit = Unit(inputs, outputs, stride)
    unit.load_state_dict(small.weights(unit))
    unit.eval().requires_grad_(False)
    values = {key: value.double() for key, value in unit.state_dict().items()}
    x = small.draw("features", (2, inputs, 8, 6)).double()

    branch = F.conv2d(plain_norm(x, values, "res_layer.0"), values["res_layer.1.weight"], padding=1)
    slope = values["res_layer.2.weight"].view(1, -1, 1, 1)
    branch = torch.where(branch > 0, branch, slope * branch)
    branch = F.conv2d(branch, values["res_layer.3.weight"], stride=stride, padding=1)
    branch = plain_norm(branch, values, "res_layer.4")
    gate = torch.einsum("oi,bi->bo", values["res_layer.5.fc1.weight"][:, :, 0, 0], branch.mean(dim=(2, 3))).clamp(min=0)
    gate = 1 / (1 + torch.exp(-torch.einsum("oi,bi->bo", values["res_layer.5.fc2.weight"][:, :, 0, 0], gate)))
    shortcut = x[:, :, ::stride, ::stride]
    if inputs != outputs:
        shortcut = torch.einsum("oi,bihw->bohw", values["shortcut_layer.0.weight"][:, :, 0, 0], shortcut)
        shortcut = plain_norm(shortcut, values, "shortcut_layer.1")
    assert relative_error(unit(x.float()), branch * gate[:, :, None, None] + shortcut) < 2e-6


def test_pyramid_sizes_and_taps() -> None:
    model = Pyramid(small.WIDTHS).eval().requires_grad_(False)
    assert len(model.body) == sum(STAGES) == 24
    taps: dict[int, Tensor] = {}
    for i in (6, 20, 23):
        model.body[i].register_forward_hook(lambda _module, _inputs, out, i=i: taps.__setitem__(i, out))
    coarse, medium, fine = model.pyramid(small.images("pyramid", 1, 64)[:, :, :48])
    assert [tuple(x.shape) for x in (coarse, medium, fine)] == [(1, 16, 3, 4), (1, 16, 6, 8), (1, 16, 12, 16)]
    assert torch.equal(coarse, taps[23])
    torch.testing.assert_close(medium, plain_enlarge(coarse) + model.latlayer1(taps[20]))
    torch.testing.assert_close(fine, plain_enlarge(medium) + model.latlayer2(taps[6]))


def plain_enlarge(x: Tensor) -> Tensor:
    """Linear interpolation along both axes between the corners' centres, to twice the size."""
    for axis in (2, 3):
        positions = np.linspace(0, x.shape[axis] - 1, 2 * x.shape[axis])
        left = np.minimum(positions.astype(int), x.shape[axis] - 2)
        share = torch.from_numpy((positions - left).astype(np.float32))
        share = share.view(-1, 1) if axis == 2 else share
        x = x.index_select(axis, torch.from_numpy(left)) * (1 - share) + share * x.index_select(
            axis, torch.from_numpy(left + 1)
        )
    return x


def test_widths_come_from_the_tensors() -> None:
    widths = Widths(8, 16, 24, 32, 40)
    tensors = {f"encoder.{key}": value for key, value in Pyramid(widths).state_dict().items()}
    assert widths_like(tensors, "encoder.", "file.pt") == widths
    tensors = {key: torch.zeros(1).expand(1024, 1024, 3, 3) for key in tensors}
    assert widths_like(tensors, "encoder.", "file.pt") == Widths(64, 64, 128, 256, 512)
