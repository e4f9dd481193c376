"""Encoder for editing (Tov et al., SIGGRAPH 2021) with a StyleGAN2 generator: purifier of the CelebA-gender task."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlvgm.checkpoint import CheckpointError, find_weights, load_tensors, read_checkpoint, read_mapping, read_option
from mlvgm.irse import Pyramid, Widths, widths_like
from mlvgm.stylegan2 import EqualLinear, StyleGan2Purifier, generator_like, read_latent_avg, read_size

IMAGE_SIZE = 256
COARSE, MIDDLE = 3, 7  # rows below 3 read the coarse map, rows below 7 the medium one, the others the fine one


class StyleHead(nn.Module):
    """Stride-2 convolutions down to one pixel, then a linear layer: (B, in, 2^k, 2^k) to (B, d)."""

    def __init__(self, inputs: int, outputs: int, halvings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(halvings):
            layers += [nn.Conv2d(outputs if i else inputs, outputs, 3, 2, 1), nn.LeakyReLU(0.01)]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class Encoder4Editing(Pyramid):
    """One base code from the coarsest map, and for every further row an offset from it (section 4.1).

    ``forward`` takes (B, 3, 256, 256) in [-1, 1] and gives (B, n, d).
    """

    def __init__(self, widths: Widths, n_latents: int, style_dim: int) -> None:
        super().__init__(widths)
        halvings = [4 if i < COARSE else 5 if i < MIDDLE else 6 for i in range(n_latents)]
        self.styles = nn.ModuleList(StyleHead(widths.stage4, style_dim, count) for count in halvings)

    def forward(self, images: Tensor) -> Tensor:
        coarse, medium, fine = self.pyramid(images)
        codes = [head(coarse) for head in self.styles[:COARSE]]
        codes += [head(medium) for head in self.styles[COARSE:MIDDLE]]
        codes += [head(fine) for head in self.styles[MIDDLE:]]
        base = codes[0]
        return torch.stack([base, *(base + offset for offset in codes[1:])], dim=1)


class E4ePurifier(StyleGan2Purifier):
    """e4e and StyleGAN2 on 256-pixel images, whatever the generator's size (Serez et al., WACV 2025, section 4)."""

    image_size = IMAGE_SIZE

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """W+ codes (B, n, d), alone in a tuple, of ``images`` (B, 3, 256, 256) in [0, 1]."""
        return (self.encoder((images - 0.5) / 0.5) + self.latent_avg,)

    def decode(self, mixed: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.decoder(mixed), self.image_size) * 0.5 + 0.5


def read_e4e(path: str | Path) -> E4ePurifier:
    """The purifier of a published e4e checkpoint: ``state_dict``, ``latent_avg`` and ``opts``.

    Widths and generator size come from the file, so narrower and smaller models load as well.

    Raises:
        CheckpointError: naming the file and the first key or option that is missing or wrong.
    """
    checkpoint = read_checkpoint(path)
    opts = read_mapping(checkpoint, "opts", path)
    tensors = find_weights(checkpoint, "decoder.input.input", path)
    if (kind := read_option(opts, "encoder_type", str, path)) != "Encoder4Editing":
        raise CheckpointError(f"{path}: option 'encoder_type' is {kind!r:.80}; only 'Encoder4Editing' is known")
    size = read_size(opts, "stylegan_size", path)
    with torch.device("meta"):  # the file's own tensors take the place of these
        decoder = generator_like(tensors, "decoder.", size, path)
        encoder = Encoder4Editing(widths_like(tensors, "encoder.", path), decoder.n_latents, decoder.style_dim)
    load_tensors(nn.ModuleDict({"encoder": encoder, "decoder": decoder}), tensors, path)
    latent_avg = read_latent_avg(checkpoint, opts, (decoder.n_latents, decoder.style_dim), path)
    return E4ePurifier(encoder, decoder, latent_avg).eval().requires_grad_(False)
