import pytest
import torch

from evaluation.changes import L2, Blur, Change, Flow, Linf, LowFrequency, Patch

ALL: list[Change] = [L2(0.7), Linf(0.05), LowFrequency(1.0), Patch(0.5), Flow(1.5), Blur(0.5)]
STILL: list[Change] = [LowFrequency(1.0), Flow(1.5), Blur(0.5)]  # whose zero is no change


def _clean(count: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def _size(change: Change, clean: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """How far from no change, in the unit in which a set has its size."""
    if isinstance(change, L2 | LowFrequency):
        moved = parameters - clean if isinstance(change, L2) else parameters
        return moved.flatten(1).norm(dim=1)
    moved = parameters - clean if isinstance(change, Linf) else parameters
    return moved.flatten(1).abs().amax(dim=1) / (2 if isinstance(change, Patch | Blur) else 1)


@pytest.mark.parametrize("change", ALL, ids=lambda change: type(change).__name__)
def test_whatever_step_is_taken_the_change_stays_within_its_set(change: Change) -> None:
    clean, generator = _clean(), torch.Generator().manual_seed(2)
    parameters = change.start(clean, generator)
    for _ in range(5):
        assert (_size(change, clean, parameters) <= change.size + 1e-5).all()
        images = change.apply(clean, parameters)
        assert images.shape == clean.shape
        assert images.min() >= -1e-6
        assert images.max() <= 1 + 1e-6
        far = parameters + 10 * change.size * change.direction(torch.randn(parameters.shape, generator=generator))
        parameters = change.project(clean, far)
    assert torch.allclose(change.project(clean, parameters), parameters, atol=1e-6)


@pytest.mark.parametrize("change", ALL, ids=lambda change: type(change).__name__)
def test_every_image_has_parameters_and_gradients_of_its_own(change: Change) -> None:
    clean = _clean()
    parameters = change.start(clean, torch.Generator().manual_seed(3)).requires_grad_()
    (gradient,) = torch.autograd.grad(change.apply(clean, parameters)[1].square().sum(), parameters)
    assert gradient[1].abs().sum() > 0
    assert not gradient[[0, 2]].any()
    alone = change.apply(clean[1:2], parameters[1:2].detach())
    assert torch.allclose(alone, change.apply(clean, parameters.detach())[1:2], atol=1e-6)


@pytest.mark.parametrize("change", STILL, ids=lambda change: type(change).__name__)
def test_zero_changes_nothing(change: Change) -> None:
    clean = _clean()
    still = torch.zeros_like(change.start(clean, torch.Generator().manual_seed(4)))
    assert torch.allclose(change.apply(clean, still), clean, atol=1e-5)


def test_low_frequencies_keep_their_norm_and_leave_high_ones_alone() -> None:
    clean = torch.full((2, 3, 16, 16), 0.5)
    change = LowFrequency(0.5)
    added = change.apply(clean, change.start(clean, torch.Generator().manual_seed(5))) - clean
    assert added.flatten(1).norm(dim=1).tolist() == pytest.approx([0.5, 0.5], rel=1e-4)
    spectrum = torch.fft.rfft2(added).abs()
    assert spectrum[:, :, 4:-3].amax() < 0.2 * spectrum.amax()


def test_a_patch_stays_where_it_is_and_covers_its_share() -> None:
    clean, change = _clean(side=20), Patch(0.5, share=0.09)
    start = change.start(clean, torch.Generator().manual_seed(6))
    moved = change.project(clean, start + change.direction(torch.zeros_like(start)))
    changed = (change.apply(clean, moved) != clean).any(dim=1).flatten(1).float().mean(dim=1)
    assert changed.tolist() == pytest.approx([0.09] * 3)


def test_flow_moves_by_pixels() -> None:
    clean = torch.zeros(1, 3, 16, 16)
    clean[:, :, 8, 8] = 1
    moved = Flow(2.0).apply(clean, torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4))
    assert moved[0, 0].argmax() == 8 * 16 + 6
    assert moved.amax() > 0.99


def test_blur_agrees_with_the_one_of_the_purifiers() -> None:
    from mlvgm.preprocess import blur_images, gaussian_taps

    clean = _clean()
    found = Blur(0.5).apply(clean, torch.ones(3, 2))
    assert torch.allclose(found, blur_images(clean, gaussian_taps(7)), atol=1e-6)
