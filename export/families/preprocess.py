"""The input transforms of `mlvgm.preprocess` as part of a graph."""

import torch
from torch import Tensor, nn

from mlvgm.preprocess import add_noise, blur_images, blur_kernel_size, gaussian_taps

MAX_TAPS = 15
"""Beyond 7 sigma the taps of the blur are below 1e-10: cutting them changes nothing in fp32."""


class Preprocess(nn.Module):
    """Blur, then input noise, each where the recipe has it: images (B, 3, H, W) [, noise] -> images."""

    taps: Tensor

    def __init__(self, image_size: int, blur: bool, input_noise_l2: float) -> None:
        super().__init__()
        self.blur, self.input_noise_l2 = blur, input_noise_l2
        taps = gaussian_taps(blur_kernel_size(image_size)) if blur else torch.ones(1)
        cut = max(len(taps) - MAX_TAPS, 0) // 2
        self.register_buffer("taps", taps[cut : len(taps) - cut])

    def forward(self, images: Tensor, *input_noise: Tensor) -> Tensor:
        if self.blur:
            images = blur_images(images, self.taps)
        if input_noise:
            images = add_noise(images, input_noise[0], self.input_noise_l2)
        return images
