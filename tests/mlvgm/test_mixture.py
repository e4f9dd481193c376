"""The discretised mixture of logistics."""

import torch

from mlvgm.mixture import mixture_log_likelihood, mixture_mean


def test_probabilities_of_all_values_sum_to_one() -> None:
    # Without coefficients and with the same parameters for all colours, log p(v, v, v) is three times log p(v).
    logits = torch.zeros(1, 10, 1, 1)
    logits[:, 1:4], logits[:, 4:7] = 0.3, -1.5
    values = (torch.arange(256) / 127.5 - 1.0).view(256, 1, 1, 1).expand(256, 3, 1, 1)
    mass = torch.exp(mixture_log_likelihood(logits.expand(256, -1, -1, -1), values) / 3.0)
    assert torch.allclose(mass.sum(), torch.tensor(1.0), atol=1e-5)
    assert abs(1 + int(mass[1:-1].argmax()) - round((0.3 + 1.0) * 127.5)) <= 1


def test_mean_chains_the_colours_and_clamps() -> None:
    logits = torch.zeros(1, 10, 1, 1)
    rows = logits[:, 1:].unflatten(1, (1, 3, 3))
    rows[:, 0, 0] = torch.tensor([0.5, 0.2, 0.9]).view(3, 1, 1)
    rows[:, 0, 2] = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    k0, k1, k2 = torch.tanh(torch.tensor([1.0, 2.0, 3.0])).tolist()
    red, green = 0.5, 0.2 + k0 * 0.5
    blue = min(0.9 + k1 * red + k2 * green, 1.0)
    assert torch.allclose(mixture_mean(logits).flatten(), torch.tensor([red, green, blue]))
