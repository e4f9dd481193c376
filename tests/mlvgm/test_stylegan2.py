"""The generator's operators and their order, against plain float64 loops written from the formulas."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlvgm.e4e import read_e4e
from mlvgm.stylegan2 import EqualLinear, Generator, ModulatedConv, Resample, StyledConv, ToRGB, upfirdn
from tests.mlvgm import small
from tests.reference import relative_error

Array = NDArray[np.float64]
TOLERANCE = 2e-6


def as64(tensor: Tensor) -> Array:
    return tensor.detach().numpy().astype(np.float64)


def plain_upfirdn(image: Array, kernel: Array, up: int, pad: tuple[int, int]) -> Array:
    """Each output pixel as a sum over the taps that fall on a pixel of ``image`` (C, H, W)."""
    channels, height, width = image.shape
    taps = len(kernel)
    rows, columns = up * height + sum(pad) - taps + 1, up * width + sum(pad) - taps + 1
    out = np.zeros((channels, rows, columns))
    for y in range(rows):
        for x in range(columns):
            for i in range(taps):
                for j in range(taps):
                    # True convolution: the last tap meets the first pixel of the window.
                    row, column = y + i - pad[0], x + j - pad[0]
                    inside = 0 <= row < up * height and 0 <= column < up * width
                    if inside and row % up == 0 and column % up == 0:
                        out[:, y, x] += kernel[taps - 1 - i, taps - 1 - j] * image[:, row // up, column // up]
    return out


def plain_conv(image: Array, weight: Array) -> Array:
    """Correlation of (C, H, W) with (O, C, k, k), zero padding, same size."""
    half = weight.shape[-1] // 2
    padded = np.pad(image, ((0, 0), (half, half), (half, half)))
    out = np.zeros((len(weight), *image.shape[1:]))
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            window = padded[:, y : y + 2 * half + 1, x : x + 2 * half + 1]
            out[:, y, x] = np.tensordot(weight, window, axes=3)
    return out


def plain_scatter(image: Array, weight: Array) -> Array:
    """Stride-2 transposed convolution: each pixel of (C, H, W) stamps its 3x3 patch, giving (O, 2H + 1, 2W + 1)."""
    out = np.zeros((len(weight), 2 * image.shape[1] + 1, 2 * image.shape[2] + 1))
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            out[:, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3] += np.tensordot(image[:, y, x], weight, axes=(0, 1))
    return out


def plain_linear(layer: EqualLinear, x: Array) -> Array:
    return as64(layer.weight) @ x * layer.lr_mul / math.sqrt(len(x)) + as64(layer.bias) * layer.lr_mul


def plain_activation(x: Array) -> Array:
    return np.where(x > 0, x, 0.2 * x) * math.sqrt(2)


def plain_modulated(conv: ModulatedConv, image: Array, style: Array) -> Array:
    weight = as64(conv.weight)[0]
    weight = weight * plain_linear(conv.modulation, style)[None, :, None, None] / math.sqrt(weight[0].size)
    if conv.demodulate:
        weight = weight / np.sqrt((weight**2).sum(axis=(1, 2, 3), keepdims=True) + 1e-8)
    if conv.upsample:
        return plain_upfirdn(plain_scatter(image, weight), as64(conv.blur.kernel), 1, (1, 1))
    return plain_conv(image, weight)


def plain_styled(layer: StyledConv, image: Array, style: Array, noise: Array) -> Array:
    x = plain_modulated(layer.conv, image, style) + float(layer.noise.weight) * noise[0, 0]
    return plain_activation(x + as64(layer.activate.bias)[:, None, None])


def plain_rgb(layer: ToRGB, image: Array, style: Array) -> Array:
    return plain_modulated(layer.conv, image, style) + as64(layer.bias)[0]


def small_generator(size: int) -> Generator:
    generator = Generator([6, 5, 4][: size.bit_length() - 2], style_dim=8)
    values = small.weights(generator)
    for key in values:
        if key.endswith("kernel"):  # lopsided, so that a missing flip shows
            values[key] = values[key] + 0.02 * small.draw(key, (4, 4))
    generator.load_state_dict(values)
    return generator.eval().requires_grad_(False)


@pytest.mark.parametrize(("up", "pad"), [(1, (1, 1)), (2, (2, 1)), (2, (0, 0)), (3, (2, 3))])
def test_upfirdn_matches_loops(up: int, pad: tuple[int, int]) -> None:
    image, kernel = small.draw("image", (2, 3, 5, 4)), small.draw("kernel", (4, 4))
    expected = np.stack([plain_upfirdn(as64(item), as64(kernel), up, pad) for item in image])
    assert relative_error(upfirdn(image, kernel, up, pad), expected) < TOLERANCE


def test_doubling_keeps_a_flat_image_flat() -> None:
    doubled = Resample(up=2, pad=(2, 1))(torch.ones(1, 1, 6, 6))
    assert doubled.shape == (1, 1, 12, 12)
    torch.testing.assert_close(doubled[..., 1:-1, 1:-1], torch.ones(1, 1, 10, 10))


@pytest.mark.parametrize(("size", "upsample"), [(1, False), (3, False), (3, True)])
def test_modulated_conv_matches_loops(size: int, upsample: bool) -> None:
    conv = ModulatedConv(5, 4, size, style_dim=7, demodulate=size == 3, upsample=upsample)
    conv.load_state_dict(small.weights(conv))
    image, style = small.draw("features", (3, 5, 4, 6)), small.draw("style", (3, 7))
    expected = np.stack([plain_modulated(conv, as64(x), as64(s)) for x, s in zip(image, style, strict=True)])
    assert relative_error(conv(image, style).detach(), expected) < TOLERANCE


def test_mapping_network_matches_formula() -> None:
    generator = small_generator(8)
    z = small.draw("z", (3, 4, 8))
    expected = as64(z.reshape(12, 8))
    expected /= np.sqrt((expected**2).mean(axis=1, keepdims=True) + 1e-8)
    for layer in list(generator.style)[1:]:
        assert isinstance(layer, EqualLinear)
        expected = np.stack([plain_activation(plain_linear(layer, row)) for row in expected])
    assert relative_error(generator.map(z), expected.reshape(3, 4, 8)) < TOLERANCE
    # Each row is mapped by itself.
    torch.testing.assert_close(generator.map(z)[1, 2], generator.map(z[1, 2]))


def test_generator_matches_loops() -> None:
    generator = small_generator(16)
    codes = small.draw("codes", (2, 6, 8))
    noise = [as64(image) for image in generator.noises.images()]
    expected = []
    for item in as64(codes):
        x = plain_styled(generator.conv1, as64(generator.input.input)[0], item[0], noise[0])
        image = plain_rgb(generator.to_rgb1, x, item[1])
        for i, first in ((0, 1), (1, 3)):
            doubling, plain, rgb = generator.convs[2 * i], generator.convs[2 * i + 1], generator.to_rgbs[i]
            assert isinstance(doubling, StyledConv)
            assert isinstance(plain, StyledConv)
            assert isinstance(rgb, ToRGB)
            x = plain_styled(doubling, x, item[first], noise[first])
            x = plain_styled(plain, x, item[first + 1], noise[first + 1])
            enlarged = plain_upfirdn(image, as64(rgb.upsample.kernel), 2, (2, 1))
            image = plain_rgb(rgb, x, item[first + 2]) + enlarged
        expected.append(image)
    assert relative_error(generator(codes), np.stack(expected)) < TOLERANCE


@pytest.mark.parametrize(("size", "rows"), [(32, 8), (64, 10), (512, 16), (1024, 18)])
def test_rows_of_a_code(size: int, rows: int) -> None:
    with torch.device("meta"):
        generator = Generator([4] * (size.bit_length() - 2), style_dim=8)
    assert (generator.size, generator.n_latents) == (size, rows)
    assert [image.shape[-1] for image in generator.noises.images()][-2:] == [size, size]


def test_purify_interpolates_per_latent(tmp_path: Path) -> None:
    purifier = read_e4e(small.save(small.e4e(), tmp_path))
    images, n = small.images("purify", 2, 256), purifier.n_latents
    noise = [small.draw(f"noise{i}", (2, small.STYLE_DIM)) for i in range(n)]
    alphas = [0.0, 1.0, *[0.25] * (n - 2)]
    purified = purifier.purify(images, noise, alphas)
    prior = [purifier.decoder.map(z) for z in noise]
    torch.testing.assert_close(purified.mixed[0], purified.codes[0])
    torch.testing.assert_close(purified.mixed[1], prior[1])
    for i in range(2, n):
        torch.testing.assert_close(purified.mixed[i], 0.75 * purified.codes[i] + 0.25 * prior[i])
    torch.testing.assert_close(purified.images, purifier.decode(torch.stack(purified.mixed, dim=1)))
    # An item does not depend on its neighbours.
    alone = purifier.purify(images[1:], [z[1:] for z in noise], alphas)
    torch.testing.assert_close(alone.images, purified.images[1:])
