"""A recorded step gives the gradients of the step itself, for other images, weights and seeds than before."""

import pytest
import torch
from torch import Tensor, nn

from mlvgm.training.recorded import RecordedStep
from tests.devices import record_on_cpu


def test_a_replay_gives_the_gradients_of_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_cpu(monkeypatch)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def gradients(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss = weight * network(images + torch.randn_like(images)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        return loss.detach(), torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)

    recorded = RecordedStep(gradients, (torch.rand(5, 3, 8, 8), torch.zeros(())), optimizer)
    for seed, weight in ((1, 0.5), (2, 2.0)):
        images = torch.rand(5, 3, 8, 8)
        found = []
        for step in (recorded, gradients):
            torch.manual_seed(seed)
            outputs = step(images, torch.tensor(weight))
            grads = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
            found.append([*(tensor.clone() for tensor in outputs), *grads])
            if step is recorded:
                owned = [parameter.grad for parameter in network.parameters()]
        assert len(found[0]) == len(found[1]) == 6
        for ours, expected in zip(*found, strict=True):
            assert torch.allclose(ours, expected, atol=1e-6)
        for parameter, gradient in zip(network.parameters(), owned, strict=True):
            parameter.grad = gradient  # the graph's memory, which the next replay writes to
        optimizer.step()
