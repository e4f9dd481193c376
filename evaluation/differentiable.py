"""A purifier in PyTorch, for gradients through it: the stages that are exported, each run as seldom as it may be."""

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export import families
from export.stage import as_tuple
from handlers.manifest import StageSpec
from handlers.noise import image_noise, latent_noise
from handlers.plan import Plan, is_noise
from mlvgm.purifier import Purifier

Floats = NDArray[np.float32]
Inputs = dict[str, tuple[Tensor, ...]]
"""What each stage takes, by its name, in the order in which they run; without noise and alphas."""


class Differentiable:
    """Images (B, 3, H, W) to S purified ones each, (S * B, 3, H, W); all that S samples have in common runs once.

    Args:
        purifier: of a family that can be exported (`export.families.stages`).
        alphas: the schedule, one for each latent; the first ones that are 0 are what samples have in common.
        blur, input_noise_l2: whether images are blurred first, and the L2 norm of the noise that is added to them.
        device: where all of it runs; images come from the CPU.

    Raises:
        ValueError: no family knows how to export this purifier.
    """

    def __init__(
        self, purifier: Purifier, alphas: Sequence[float], blur: bool, input_noise_l2: float, device: str = "cpu"
    ) -> None:
        kept = next((i for i, alpha in enumerate(alphas) if alpha), 0)
        self.stages = families.stages(purifier, blur, input_noise_l2, kept)
        specs = [StageSpec(stage.name, "", stage.inputs, stage.outputs) for stage in self.stages]
        self.per_image = {spec.name for spec in Plan.of(specs, alphas).per_image}
        modules = [cast(nn.Module, stage.module()).eval().requires_grad_(False) for stage in self.stages]
        self.modules = [m.to(device, memory_format=torch.channels_last) for m in modules]  # type: ignore[call-overload]
        self.alphas, self.device = torch.tensor(alphas, device=device), device
        self.noise_shapes, self.size = purifier.noise_shapes, purifier.image_size

    def __call__(self, images: Tensor, samples: int, seeds: Sequence[int] = ()) -> tuple[Tensor, Inputs]:
        """Purified images, the first samples of all before the second ones, and what the stages took.

        Args:
            seeds: one per image, of the noise that `handlers.pipeline.Pipeline` draws; none for any noise.
        """
        values, inputs = {"images": images.to(self.device), "alphas": self.alphas}, {}
        for stage, module in zip(self.stages, self.modules, strict=True):
            times, taken = 1 if stage.name in self.per_image else samples, {}
            for name in (tensor.name for tensor in stage.inputs):
                if is_noise(name):
                    taken[name] = self._noise(name, len(images), times, seeds)
                elif name == "alphas" or len(values[name]) == times * len(images):
                    taken[name] = values[name]
                else:
                    taken[name] = values[name].repeat(times, *[1] * (values[name].ndim - 1))
            inputs[stage.name] = tuple(t for name, t in taken.items() if name != "alphas" and not is_noise(name))
            made = as_tuple(module(*taken.values()))
            values |= {tensor.name: value for tensor, value in zip(stage.outputs, made, strict=True)}
        return values["images"], inputs

    def _noise(self, name: str, count: int, samples: int, seeds: Sequence[int]) -> Tensor:
        """The noise input ``name`` of a stage, for so many images and samples of each."""
        drawn = [sample for sample in range(samples) for _ in range(count)]

        def normal(shape: tuple[int, ...], seeded: Callable[[Sequence[int], Sequence[int]], Floats]) -> Tensor:
            made = torch.from_numpy(seeded([*seeds] * samples, drawn)) if seeds else torch.randn(len(drawn), *shape)
            return made.to(self.device)

        def latent(i: int) -> Tensor:
            shape = self.noise_shapes[i]
            return normal(shape, lambda rows, samples: latent_noise(rows, samples, i, shape))

        if name == "input_noise":
            shape = (3, self.size, self.size)
            return normal(shape, lambda rows, samples: image_noise(rows, samples, shape[1:]))
        if name == "noise":
            return torch.stack([latent(i) for i in range(len(self.noise_shapes))], dim=1)
        return latent(int(name.removeprefix("noise_")))
