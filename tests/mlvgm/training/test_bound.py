"""The bound under interpolated latents: its limits are the plain bound and draws from the prior."""

import pytest
import torch

from mlvgm.nvae import NVAE
from mlvgm.training.bound import answer_divergence, evidence_lower_bound, random_schedules
from tests.export.models import CONFIG


@pytest.fixture(scope="module")
def network() -> NVAE:
    torch.manual_seed(0)
    return NVAE(CONFIG).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_latents_from_the_prior_cost_nothing_and_know_nothing(network: NVAE, images: torch.Tensor) -> None:
    torch.manual_seed(2)
    bound = evidence_lower_bound(network, images, alphas=torch.ones(4, 3))
    torch.manual_seed(2)
    other = evidence_lower_bound(network, images.flip(0), alphas=torch.ones(4, 3))
    for divergence in bound.divergence:
        assert divergence.abs().max() < 1e-3
    assert torch.allclose(bound.reconstruction, other.reconstruction, atol=1e-6)


@torch.no_grad()
def test_weights_of_zero_are_the_plain_bound(network: NVAE, images: torch.Tensor) -> None:
    torch.manual_seed(2)
    plain = evidence_lower_bound(network, images)
    torch.manual_seed(2)
    zero = evidence_lower_bound(network, images, alphas=torch.zeros(4, 3))
    assert torch.equal(plain.log_likelihood, zero.log_likelihood)
    assert all(torch.equal(a, b) for a, b in zip(plain.divergence, zero.divergence, strict=True))
    assert all((divergence > 0).all() for divergence in plain.divergence)


@torch.no_grad()
def test_the_divergence_is_that_of_the_interpolated_gaussian(network: NVAE, images: torch.Tensor) -> None:
    """Of the first latent, whose prior is the standard normal: against torch's own formula."""
    alphas = torch.full((4, 3), 0.3)
    bound = evidence_lower_bound(network, images, alphas=alphas)
    features = network.encode(images)
    x = network.to_latent(0, 0, network.start(4))
    _, _, delta, delta_log_sigma = network.prior_and_posterior(0, 0, x, features[0])
    mean, sigma = 5 * torch.tanh(delta / 5), torch.exp(5 * torch.tanh(delta_log_sigma / 5))
    mixed = torch.distributions.Normal(0.7 * mean, torch.sqrt((0.7 * sigma) ** 2 + 0.3**2))
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(mixed, standard).flatten(1).sum(dim=1)
    assert torch.allclose(bound.divergence[0], expected, rtol=1e-4)


def test_answers_are_compared_by_the_divergence_of_their_softmax() -> None:
    torch.manual_seed(0)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    clean, purified = torch.rand(6, 3, 2, 2), torch.rand(6, 3, 2, 2, requires_grad=True)
    divergence = answer_divergence(classifier, clean, purified)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=classifier(clean)),
        torch.distributions.Categorical(logits=classifier(purified)),
    )
    assert torch.allclose(divergence, expected, atol=1e-6)
    assert answer_divergence(classifier, clean, clean).abs().max() < 1e-6
    divergence.sum().backward()
    assert purified.grad is not None


def test_schedules_rise_from_zero_and_hold_the_cases_of_purification() -> None:
    torch.manual_seed(0)
    schedules = random_schedules(20_000, 4, whole=0.25)
    assert 0.0 <= float(schedules.min()) <= float(schedules.max()) <= 1.0
    assert (schedules.diff(dim=1) >= 0).all()
    assert 0.23 < (schedules.max(dim=1).values == 0).float().mean() < 0.27
    for wanted in ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]):
        assert torch.isclose(schedules, torch.tensor(wanted)).all(dim=1).any(), wanted
