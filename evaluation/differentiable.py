"""A purifier in PyTorch, for gradients through it: the stages that are exported, each run as seldom as it may be."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from export import families
from export.stage import as_tuple
from handlers.manifest import StageSpec, TensorSpec
from handlers.noise import image_noise, latent_noise
from handlers.plan import Plan, is_noise
from mlvgm.purifier import Purifier

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
        self.stages = families.stages(purifier, blur, input_noise_l2, families.kept_by(alphas))
        specs = [StageSpec(stage.name, "", stage.inputs, stage.outputs) for stage in self.stages]
        self.per_image = {spec.name for spec in Plan.of(specs, alphas).per_image}
        modules = [cast(nn.Module, stage.module()).eval().requires_grad_(False) for stage in self.stages]
        self.modules = [m.to(device, memory_format=torch.channels_last) for m in modules]  # type: ignore[call-overload]
        self.alphas, self.device = torch.tensor(alphas, device=device), device

    def __call__(self, images: Tensor, samples: int, seeds: Sequence[int] = ()) -> tuple[Tensor, Inputs]:
        """Purified images, the first samples of all before the second ones, and what the stages took.

        Args:
            seeds: one per image, of the noise that `handlers.pipeline.Pipeline` draws; none for any noise.
        """
        values, inputs = {"images": images.to(self.device), "alphas": self.alphas}, {}
        for stage, module in zip(self.stages, self.modules, strict=True):
            times, taken = 1 if stage.name in self.per_image else samples, {}
            for spec in stage.inputs:
                name = spec.name
                if is_noise(name):
                    taken[name] = self._noise(spec, len(images), times, seeds)
                elif name == "alphas" or len(values[name]) == times * len(images):
                    taken[name] = values[name]
                else:
                    taken[name] = values[name].repeat(times, *[1] * (values[name].ndim - 1))
            inputs[stage.name] = tuple(t for name, t in taken.items() if name != "alphas" and not is_noise(name))
            made = as_tuple(module(*taken.values()))
            values |= {tensor.name: value for tensor, value in zip(stage.outputs, made, strict=True)}
        return values["images"], inputs

    def _noise(self, spec: TensorSpec, count: int, samples: int, seeds: Sequence[int]) -> Tensor:
        """The noise that a stage takes as ``spec``, for so many images and samples of each."""
        shape = [int(size) for size in spec.shape[1:]]
        if not seeds:
            return torch.randn(samples * count, *shape).to(self.device)
        rows, drawn = [*seeds] * samples, np.repeat(np.arange(samples), count).tolist()
        if spec.name == "input_noise":
            noise = image_noise(rows, drawn, shape[1:])
        elif spec.name == "noise":  # (n, d): of all latents
            noise = np.stack([latent_noise(rows, drawn, i, shape[1:]) for i in range(shape[0])], axis=1)
        else:
            noise = latent_noise(rows, drawn, int(spec.name.removeprefix("noise_")), shape)
        return torch.from_numpy(noise).to(self.device)
