"""The input transforms of `mlvgm.preprocess` (blur and noise), added to the graph of a family's first stage."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from export.precision import copied, fp16_stage
from export.stage import Stage
from handlers.manifest import TensorSpec
from mlvgm.preprocess import add_noise, blur_images, blur_kernel_size, gaussian_taps

MAX_TAPS = 15
"""Of the blur. Taps further out, beyond 7 sigma, are below 1e-10 and change nothing in fp32."""


def with_preprocessing(stage: Stage, image_size: int, blur: bool, input_noise_l2: float) -> Stage:
    """``stage``, whose input is images, preceded by a blur and by added noise where the recipe asks for them."""
    if not blur and not input_noise_l2:
        return stage
    (images,) = stage.inputs

    def reference(images: Tensor, *noise: Tensor) -> Tensor | Sequence[Tensor]:
        images = blur_images(images) if blur else images
        return stage.reference(add_noise(images, noise[0], input_noise_l2) if noise else images)

    return replace(
        stage,
        module=lambda: Preprocessed(cast(nn.Module, stage.module()), image_size, blur, input_noise_l2),
        reference=reference,
        inputs=(images, TensorSpec("input_noise", images.shape)) if input_noise_l2 else (images,),
    )


class Preprocessed(nn.Module):
    """images (B, 3, H, W) in [0, 1] [, noise of that shape] -> outputs of ``stage`` for the blurred, noisy images."""

    taps: Tensor

    def __init__(self, stage: nn.Module, image_size: int, blur: bool, input_noise_l2: float) -> None:
        super().__init__()
        self.stage, self.blur, self.input_noise_l2 = stage, blur, input_noise_l2
        taps = gaussian_taps(blur_kernel_size(image_size)) if blur else torch.ones(1)
        cut = max(len(taps) - MAX_TAPS, 0) // 2
        self.register_buffer("taps", taps[cut : len(taps) - cut])

    def forward(self, images: Tensor, *input_noise: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self.blur:
            images = blur_images(images, self.taps)
        if input_noise:
            images = add_noise(images, input_noise[0], self.input_noise_l2)
        return self.stage(images)


@fp16_stage.register
def _preprocessed(module: Preprocessed) -> nn.Module:
    made = copied(module)
    made.stage = fp16_stage(module.stage)  # blur and noise stay in fp32
    return made
