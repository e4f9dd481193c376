"""The interface of all purifier families, their result, and the preprocessing of their inputs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from handlers.errors import InputError
from mlvgm.preprocess import add_noise, blur_images


@dataclass(frozen=True)
class Purified:
    """A purified batch. ``codes`` and ``mixed`` have one tensor per latent, coarse to fine.

    Attributes:
        images: (B, 3, H, W), about in [0, 1]; the StyleGAN2 families do not clamp.
        codes: the encoder's latents, (B, 512) or (B, z, h, w) each.
        mixed: the latents after interpolation with resampled ones, same shapes.
    """

    images: Tensor
    codes: tuple[Tensor, ...]
    mixed: tuple[Tensor, ...]


class Purifier(nn.Module, ABC):
    """Encode, resample, interpolate, decode (Serez et al., WACV 2025, section 3): a pure function of its arguments.

    Attributes:
        image_size: side of the square images, in pixels.
        noise_shapes: shape of one sample's noise for each latent, coarse to fine: (512,) or (z, h, w).
    """

    image_size: int
    noise_shapes: tuple[tuple[int, ...], ...]

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """The encoder's outputs for ``images`` (B, 3, H, W) in [0, 1], as `generate` takes them."""

    @abstractmethod
    def generate(self, encoded: tuple[Tensor, ...], noise: Sequence[Tensor], alphas: Tensor) -> Purified:
        """Resample latents from ``noise``, interpolate by ``alphas`` (n,), and decode."""

    @property
    def n_latents(self) -> int:
        return len(self.noise_shapes)

    def purify(
        self,
        images: Tensor,
        noise: Sequence[Tensor],
        alphas: Tensor | Sequence[float],
        blur: bool = False,
        input_noise: Tensor | None = None,
        input_noise_l2: float = 0.0,
    ) -> Purified:
        """Purify a batch.

        Args:
            images: float32 (B, 3, H, W) in [0, 1].
            noise: one standard-normal tensor per latent, coarse to fine, (B, *noise_shapes[i]).
            alphas: the n effective alphas (attenuation included): 0 keeps a latent, 1 replaces it.
            blur: blur the input first, as the paper's blur variant does.
            input_noise: standard-normal (B, 3, H, W), scaled per image to the L2 norm ``input_noise_l2`` and added.
            input_noise_l2: norm of the added noise, in units of the [0, 1] image.

        Raises:
            InputError: an argument has the wrong shape or count.
        """
        check_batch(images, self.image_size, noise, self.noise_shapes)
        if len(alphas) != self.n_latents:
            raise InputError(f"this purifier has {self.n_latents} latents; got {len(alphas)} alphas")
        if blur:
            images = blur_images(images)
        if input_noise is not None:
            images = add_noise(images, input_noise, input_noise_l2)
        weights = torch.as_tensor(alphas, dtype=images.dtype, device=images.device)
        return self.generate(self.encode(images), noise, weights)


class Autoencoder(nn.Module, ABC):
    """A purifier that encodes, samples and decodes, without interpolation: a baseline of the paper (section 4).

    Attributes:
        image_size: side of the square images, in pixels.
        noise_shapes: shape of one image's noise for each draw, in the order of their use.
    """

    image_size: int
    noise_shapes: tuple[tuple[int, ...], ...]

    @abstractmethod
    def reconstruct(self, images: Tensor, noise: Sequence[Tensor]) -> Purified:
        """Encode, sample with ``noise`` and decode."""

    def purify(self, images: Tensor, noise: Sequence[Tensor]) -> Purified:
        """Purify a batch.

        Args:
            images: float32 (B, 3, H, W) in [0, 1].
            noise: standard-normal tensors, (B, *noise_shapes[i]).

        Returns:
            As of other purifiers; ``codes`` are the posterior means, ``mixed`` the samples drawn around them.

        Raises:
            InputError: an argument has the wrong shape or count.
        """
        check_batch(images, self.image_size, noise, self.noise_shapes)
        return self.reconstruct(images, noise)


def check_batch(images: Tensor, size: int, noise: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises InputError unless images are (B, 3, size, size), and the noise one (B, *shape) for each of ``shapes``."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise InputError(f"images must be (B, 3, {size}, {size}), not {tuple(images.shape)}")
    if len(noise) != len(shapes):
        raise InputError(f"this purifier takes {len(shapes)} noise tensors, not {len(noise)}")
    for i, (tensor, shape) in enumerate(zip(noise, shapes, strict=True)):
        if tuple(tensor.shape) != (len(images), *shape):
            raise InputError(f"noise[{i}] must be {(len(images), *shape)}, not {tuple(tensor.shape)}")
