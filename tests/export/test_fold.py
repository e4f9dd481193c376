"""Folding changes no number and removes the work it says it removes."""

import pytest
import torch
from torch import nn

from export.families import stages
from export.families.nvae import Decode, Encode
from export.families.preprocess import Preprocessed
from export.fold import fold_batch_norms, norm_then_pointwise, without_weight_norm
from export.stage import as_tuple
from export.trace import example
from tests.export import models
from tests.reference import relative_error


def test_batch_norms_behind_convolutions_and_linears_vanish() -> None:
    classifier = models.classifier()
    folded = fold_batch_norms(classifier)
    images = torch.rand(3, 3, 32, 32)
    assert relative_error(folded(images), classifier(images)) < 1e-5
    assert any(isinstance(m, nn.BatchNorm2d) for m in classifier.modules())
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in folded.modules())


def test_a_norm_that_two_layers_read_is_left_alone() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            result: torch.Tensor = self.norm(y) + y
            return result

    model = models.unsettle(Branching())
    images = torch.rand(2, 3, 4, 4)
    assert relative_error(fold_batch_norms(model)(images), model(images)) < 1e-6


def test_a_model_that_cannot_be_traced_comes_back_whole() -> None:
    class Awkward(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.mean() > 0 else -x

    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(fold_batch_norms(Awkward())(images), images)


def test_norm_in_front_of_a_pointwise_convolution() -> None:
    torch.manual_seed(0)
    norm, conv = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, bias=False)
    models.unsettle(norm)
    x = torch.randn(2, 4, 5, 5)
    assert relative_error(norm_then_pointwise(norm, conv)(x).detach(), conv(norm(x)).detach()) < 1e-6


def test_removing_weight_norm_leaves_the_original_usable() -> None:
    purifier = models.purifier()
    images = torch.rand(1, 3, 32, 32)
    before = purifier.encode(images)
    without_weight_norm(purifier.network)
    assert all(torch.equal(a, b) for a, b in zip(before, purifier.encode(images), strict=True))


def test_removing_weight_norm_copies_nothing_else() -> None:
    network = models.purifier().network
    given = {tensor.data_ptr() for tensor in network.state_dict().values()}
    plain = without_weight_norm(network)
    normed = {name.removesuffix(".parametrizations.weight.original1") for name in network.state_dict()}
    others = {name: tensor for name, tensor in plain.state_dict().items() if name.removesuffix(".weight") not in normed}
    assert given.issuperset(tensor.data_ptr() for tensor in others.values())
    assert 0 < len(others) < len(plain.state_dict())


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_every_nvae_stage_computes_what_its_reference_computes(kept: int) -> None:
    for blur, input_noise_l2 in ((False, 0.0), (True, 1.0)):
        for stage in stages(models.purifier(), blur, input_noise_l2, kept):
            inputs = [example(spec, 3, seed=i) for i, spec in enumerate(stage.inputs)]
            module = stage.module()
            assert isinstance(module, Encode | Decode | Preprocessed)
            with torch.no_grad():
                pairs = zip(as_tuple(module.eval()(*inputs)), as_tuple(stage.reference(*inputs)), strict=True)
            assert all(relative_error(found, eager) < 1e-5 for found, eager in pairs)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_chained_nvae_stages_purify(kept: int) -> None:
    torch.manual_seed(3)
    purifier = models.purifier()
    chain = stages(purifier, True, 1.0, kept)
    assert [stage.name for stage in chain] == ["encode", *["coarse"] * (kept > 0), "decode"]
    images, input_noise = torch.rand(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    noise = [torch.randn(2, *shape) for shape in purifier.noise_shapes]
    alphas = torch.tensor([0.2, 0.5, 1.0])
    known = {"images": images, "input_noise": input_noise, "alphas": alphas}
    known |= {f"noise_{i}": tensor for i, tensor in enumerate(noise)}
    with torch.no_grad():
        for stage in chain:
            made = as_tuple(stage.module()(*(known[spec.name] for spec in stage.inputs)))
            known |= {spec.name: tensor for spec, tensor in zip(stage.outputs, made, strict=True)}
    found = known["images"]
    eager = purifier.purify(images, noise, alphas, blur=True, input_noise=input_noise, input_noise_l2=1.0)
    assert relative_error(found, eager.images) < 1e-5
