import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.adaptive import Effort, Forward, Trace, ascend, cross_entropy, examine, in_precision, margin
from evaluation.attacks import predict, to_float
from evaluation.changes import L2, Linf
from tests.evaluation.models import linear, pictures
from tests.export import models


def _alone(classifier: nn.Module) -> Forward:
    return lambda images, _: Trace(classifier(images)[None], {"classify": (images,)})


def _attack(classifier: nn.Module, steps: int = 20, attempt: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Clean images, their labels, and what an attack of L2 0.3 makes of them."""
    clean = to_float(pictures(6))
    labels = torch.from_numpy(predict(classifier, pictures(6)))
    return clean, labels, ascend(_alone(classifier), clean, labels, L2(0.3), Effort(steps), attempt).images


def test_margin_and_cross_entropy_are_of_the_mean_logits() -> None:
    logits = torch.tensor([[[3.0, 1.0, 0.0]], [[1.0, 1.0, 4.0]]])
    assert margin(logits, torch.tensor([0])).item() == pytest.approx(2.0 - 2.0)
    assert margin(logits, torch.tensor([1])).item() == pytest.approx(1.0 - 2.0)
    expected = -torch.log_softmax(torch.tensor([2.0, 1.0, 2.0]), 0)[1]
    assert cross_entropy(logits, torch.tensor([1])).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("attempt", [0, 1])
def test_lowers_the_margin_as_far_as_a_linear_classifier_allows(attempt: int) -> None:
    classifier = linear(classes=2)
    clean, labels, attacked = _attack(classifier, attempt=attempt)
    change = (attacked - clean).flatten(1).norm(dim=1)
    assert (change < 0.3 + 1e-5).all()
    possible = 0.3 * (classifier.weights[:, 0] - classifier.weights[:, 1]).norm()
    gained = margin(classifier(clean)[None], labels) - margin(classifier(attacked)[None], labels)
    assert (gained > 0.99 * possible).all()


def test_gradients_in_bf16_point_where_those_in_fp32_do() -> None:
    classifier, clean = models.classifier(), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen: list[torch.dtype] = []
    classifier.register_forward_hook(lambda *taken: seen.append(taken[-1].dtype))
    gradients = []
    for effort in (Effort(), Effort(bf16=True)):
        images = clean.clone().requires_grad_()
        logits = in_precision(_alone(classifier), effort, "cpu")(images, 1).logits
        assert logits.dtype == torch.float32
        (gradient,) = torch.autograd.grad(margin(logits, torch.zeros(4, dtype=torch.long)).sum(), images)
        gradients.append(gradient.flatten(1))
    assert seen == [torch.float32, torch.bfloat16]
    assert not torch.equal(*gradients)
    assert torch.nn.functional.cosine_similarity(*gradients).min() > 0.95


def test_the_seed_decides_the_attack() -> None:
    classifier, clean = linear(), to_float(pictures(3))
    labels = torch.from_numpy(predict(classifier, pictures(3)))
    runs = [ascend(_alone(classifier), clean, labels, L2(0.3), Effort(2), seed=seed).images for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_best_images_are_kept_with_their_margin() -> None:
    classifier, clean = models.classifier(), torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = classifier(clean).argmax(dim=1)
    found = ascend(_alone(classifier), clean, labels, Linf(0.02), Effort(12))
    assert torch.allclose(margin(classifier(found.images)[None], labels), found.margins, atol=1e-4)
    assert (found.margins <= found.earlier).all()


@pytest.mark.parametrize(("change", "norm"), [(L2(0.5), 2), (Linf(4 / 255), np.inf)])
def test_is_about_as_strong_as_the_one_of_a_library(change: L2 | Linf, norm: float) -> None:
    evasion = pytest.importorskip("art.attacks.evasion")
    estimators = pytest.importorskip("art.estimators.classification")
    classifier = models.classifier()
    clean = torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = classifier(clean).argmax(dim=1)
    estimator = estimators.PyTorchClassifier(
        classifier, nn.CrossEntropyLoss(), (3, 32, 32), 3, clip_values=(0, 1), device_type="cpu"
    )
    theirs = evasion.AutoProjectedGradientDescent(
        estimator, norm=norm, eps=change.size, max_iter=20, nb_random_init=1, batch_size=24, verbose=False
    )
    other = torch.from_numpy(theirs.generate(clean.numpy(), np.eye(3, dtype=np.float32)[labels.numpy()]))
    ours = ascend(_alone(classifier), clean, labels, change, Effort(20), attempt=1).images
    margins = [margin(classifier(images)[None], labels).mean().item() for images in (clean, other, ours)]
    assert margins[2] < margins[0]
    assert margins[2] <= margins[1] + 0.05 * (margins[0] - margins[1])


def test_broken_gradients_break_no_attack_and_are_told() -> None:
    classifier, clean = linear(), to_float(pictures(4))
    labels = torch.from_numpy(predict(classifier, pictures(4)))

    def broken(images: Tensor, _: int) -> Trace:
        """The gradient of the square root of 0 is infinite, and 0 times it is not a number."""
        hole = torch.sqrt((images - images.detach()).abs()) * torch.tensor([1.0, 0, 0, 0]).view(4, 1, 1, 1)
        return Trace(classifier(images + 0 * hole)[None], {"classify": (images + hole,)})

    found = ascend(broken, clean, labels, L2(0.3), Effort(3))
    assert found.images.isfinite().all()
    seen = examine(broken, clean, labels, 1)
    assert seen.broken["images"] == 1.0
    assert seen.broken["classify"] == 0.0
    assert seen.zero["classify"] == 1.0  # nothing of it reaches the logits


def test_gradients_that_vanish_and_gradients_that_are_noise_are_told() -> None:
    classifier, clean = linear(), to_float(pictures(4))
    labels = torch.from_numpy(predict(classifier, pictures(4)))
    assert examine(_alone(classifier), clean, labels, 1).cosine == pytest.approx(1.0)
    dead = examine(lambda x, _: Trace(classifier((x > 2) + 0.0 * x)[None]), clean, labels, 1)
    assert dead.zero["images"] == 1.0

    def noisy(images: Tensor, draws: int) -> Trace:
        weights = torch.randn(draws, 1, 1, *images.shape[1:])
        many = (images * weights[:, :, 0]).sum(dim=(2, 3, 4))
        return Trace(torch.stack([many, -many, -many - 100], dim=2))

    torch.manual_seed(0)
    few, many = (examine(noisy, clean, torch.zeros(4, dtype=torch.long), draws).cosine for draws in (1, 2))
    assert max(abs(few), abs(many)) < 0.5
