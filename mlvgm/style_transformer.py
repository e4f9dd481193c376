"""Style Transformer (Hu et al., CVPR 2022) with a StyleGAN2 generator: the purifier of the Stanford-Cars task."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlvgm.checkpoint import (
    CheckpointError,
    find_weights,
    load_tensors,
    read_checkpoint,
    read_mapping,
    read_option,
    width,
)
from mlvgm.irse import Pyramid, Widths, widths_like
from mlvgm.stylegan2 import StyleGan2Purifier, generator_like, read_latent_avg, read_size

IMAGE_SIZE = 128
CANVAS = 256  # side of the square that the encoder's crop and the generator's image are cut from
BAND = 32  # rows of the canvas, above and below, that hold no car
HEADS = 4


class QueryLayer(nn.Module):
    """Transformer decoder layer with normalisation after each residual: queries read a feature map (section 3.2).

    ``forward`` takes queries (B, n, d) and a map (B, d, H, W), and gives (B, n, d).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2)
        queries = self.norm1(queries + self.self_attn(queries, queries, queries, need_weights=False)[0])
        queries = self.norm2(queries + self.multihead_attn(queries, tokens, tokens, need_weights=False)[0])
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries))))


class StyleTransformerEncoder(Pyramid):
    """Learnt queries read the feature maps coarse to fine.

    ``forward`` takes images (B, 3, 192, 256) in [-1, 1] and the mapped queries (n, d), and gives (B, n, d).

    Attributes:
        z: (1, n, d), the queries before the generator's mapping network.
    """

    def __init__(self, widths: Widths, n_latents: int, hidden: int) -> None:
        super().__init__(widths)
        self.z = nn.Parameter(torch.randn(1, n_latents, widths.stage4))
        self.transformerlayer_coarse = QueryLayer(widths.stage4, hidden)
        self.transformerlayer_medium = QueryLayer(widths.stage4, hidden)
        self.transformerlayer_fine = QueryLayer(widths.stage4, hidden)

    def forward(self, images: Tensor, queries: Tensor) -> Tensor:
        coarse, medium, fine = self.pyramid(images)
        codes: Tensor = self.transformerlayer_coarse(queries.expand(len(images), -1, -1), coarse)
        codes = self.transformerlayer_medium(codes, medium)
        return self.transformerlayer_fine(codes, fine)


class StyleTransformerPurifier(StyleGan2Purifier):
    """Style Transformer and StyleGAN2 on 128-pixel images with a car between two black bands (WACV 2025, section 4)."""

    encoder: StyleTransformerEncoder
    image_size = IMAGE_SIZE
    noise_scale = 0.8

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """W+ codes (B, n, d), alone in a tuple, of ``images`` (B, 3, 128, 128) in [0, 1]."""
        canvas = resize((images - 0.5) / 0.5, CANVAS)
        return (self.encoder(canvas[:, :, BAND:-BAND], self.decoder.map(self.encoder.z)) + self.latent_avg,)

    def decode(self, mixed: Tensor) -> Tensor:
        canvas = F.adaptive_avg_pool2d(self.decoder(mixed), CANVAS)[:, :, BAND:-BAND]
        canvas = F.pad(canvas, (0, 0, BAND, BAND), value=-1.0)
        return resize(canvas, self.image_size) * 0.5 + 0.5


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear resampling of (B, C, H, W) to a square, without antialiasing."""
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def read_style_transformer(path: str | Path) -> StyleTransformerPurifier:
    """The purifier of a published Style Transformer checkpoint: ``state_dict``, ``latent_avg`` and ``opts``.

    Widths and generator size come from the file, so narrower and smaller models load as well.

    Raises:
        CheckpointError: naming the file and the first key or option that is missing or wrong.
    """
    checkpoint = read_checkpoint(path)
    opts = read_mapping(checkpoint, "opts", path)
    tensors = find_weights(checkpoint, "decoder.module.input.input", path)
    if read_option(opts, "learn_in_w", bool, path, default=False):
        raise CheckpointError(f"{path}: option 'learn_in_w' is on: only encoders into W+ are known")
    pairs = sum(f"decoder.module.to_rgbs.{i}.bias" in tensors for i in range(8))
    size = read_size(opts, "output_size", path, default=4 * 2 ** max(pairs, 1))
    with torch.device("meta"):  # the file's own tensors take the place of these
        decoder = generator_like(tensors, "decoder.module.", size, path)
        widths = widths_like(tensors, "encoder.module.", path)._replace(stage4=decoder.style_dim)
        hidden = width(tensors, "encoder.module.transformerlayer_coarse.linear1.weight", 0, 1024, path)
        encoder = StyleTransformerEncoder(widths, decoder.n_latents, hidden)
    # The published file was saved from inside data-parallel wrappers.
    wrapped = nn.ModuleDict(
        {"encoder": nn.ModuleDict({"module": encoder}), "decoder": nn.ModuleDict({"module": decoder})}
    )
    load_tensors(wrapped, tensors, path)
    latent_avg = read_latent_avg(checkpoint, opts, (decoder.n_latents, decoder.style_dim), path)
    return StyleTransformerPurifier(encoder, decoder, latent_avg).eval().requires_grad_(False)
