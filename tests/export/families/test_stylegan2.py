"""The traced form of the StyleGAN2 families: every rewrite against the operators it replaces, and the ONNX files."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from export.compare import compare_stages
from export.families import stages
from export.families.stylegan2 import Decode, Encode, SkipUpsample, StaticConv, depthwise, first_rows, shifted
from export.families.stylegan2_encoders import CrossAttention, FoldedUnit, SelfAttention
from export.stage import Stage
from export.trace import trace
from handlers import runtimes
from mlvgm.e4e import E4ePurifier, read_e4e
from mlvgm.irse import Unit
from mlvgm.style_transformer import QueryLayer, StyleTransformerPurifier, read_style_transformer
from mlvgm.stylegan2 import StyledConv, StyleGan2Purifier, upfirdn
from tests import reference
from tests.mlvgm import small
from tests.mlvgm.conftest import one_thread  # noqa: F401  (small models here, too)
from tests.reference import relative_error

CLOSE = 3e-6
FAMILIES: dict[str, tuple[Callable[[Path], StyleGan2Purifier], Callable[[int], small.Checkpoint]]] = {
    "e4e": (read_e4e, small.e4e),
    "style_transformer": (read_style_transformer, small.style_transformer),
}


def purifier(family: str, folder: Path, size: int = 32) -> StyleGan2Purifier:
    read, checkpoint = FAMILIES[family]
    return read(small.save(checkpoint(size), folder))


def by_name(parts: tuple[Stage, ...]) -> dict[str, Stage]:
    return {stage.name: stage for stage in parts}


def lopsided(key: str) -> Tensor:
    """A filter that a flip or a transposition would change."""
    row = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(row, row) / 16 + 0.03 * small.draw(key, (4, 4))


@pytest.mark.parametrize(("height", "width"), [(9, 9), (17, 33), (4, 2)])
def test_the_blur_as_shifted_sums_is_the_published_one(height: int, width: int) -> None:
    column, row = torch.tensor([1.0, 3.0, 3.0, 1.0]), torch.tensor([1.0, 2.0, 4.0, 1.0])
    x = torch.randn(2, 5, height, width, generator=torch.Generator().manual_seed(0)).double()
    kernels = {"published": torch.outer(column, column) / 16, "separable": torch.outer(row, column) / 64}
    kernels["lopsided"] = lopsided("blur")  # which is no sum along rows of sums along columns
    torch._dynamo.reset()  # PyTorch compiles a function for no more than eight shapes
    for name, kernel in kernels.items():
        taps = kernel.double().expand(5, 1, 4, 4)
        smooth, expected = shifted(taps), depthwise(x, taps)
        assert (smooth is depthwise) == (name == "lopsided")
        torch.compile(smooth, fullgraph=True, backend="eager")(x, taps)  # which a compiler takes as a whole
        found = smooth(x, taps)
        assert found.shape == expected.shape
        assert (found - expected).norm() <= 1e-14 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("blur", "l2"), [(False, 0.0), (True, 2.0)])
@torch.no_grad()
def test_stages_keep_the_numbers(family: str, blur: bool, l2: float, tmp_path: Path) -> None:
    model = purifier(family, tmp_path)
    n, d = model.n_latents, model.decoder.style_dim
    parts = by_name(stages(model, blur, l2))
    images = small.images("stages", 2, model.image_size)
    given = [images, small.draw("input noise", tuple(images.shape))] if l2 else [images]
    codes = parts["encode"].reference(*given)
    assert isinstance(codes, Tensor)
    assert relative_error(parts["encode"].module()(*given), codes) < CLOSE
    noise, alphas = small.draw("noise", (2, n, d)), torch.linspace(0, 1, n)
    mixed = parts["resample"].reference(codes, noise, alphas)
    assert isinstance(mixed, Tensor)
    assert relative_error(parts["resample"].module()(codes, noise, alphas), mixed) < CLOSE
    assert relative_error(parts["decode"].module()(mixed), parts["decode"].reference(mixed)) < CLOSE
    # The references in a row are the purifier.
    whole = model.purify(images, noise.unbind(1), alphas, blur, given[1] if l2 else None, l2)
    torch.testing.assert_close(parts["decode"].reference(mixed), whole.images)


def test_the_purifier_is_left_as_it_was(tmp_path: Path) -> None:
    model = purifier("e4e", tmp_path)
    before = copy.deepcopy(model.state_dict())
    for stage in stages(model, blur=True, input_noise_l2=1.0):
        stage.module()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [8, 64, 128, 256, 512, 1024])
@torch.no_grad()
def test_every_size_is_pooled_or_repeated_alike(family: str, size: int, tmp_path: Path) -> None:
    model = purifier(family, tmp_path, size)
    mixed = small.draw("mixed", (1, model.n_latents, model.decoder.style_dim))
    found, expected = Decode(model)(mixed), model.decode(mixed)
    assert relative_error(found, expected) < CLOSE
    # Row by row: a wrong edge of the cut hides in a mean over the image.
    worst = (found - expected).abs().amax(dim=(1, 3)) / expected.square().mean().sqrt()
    assert float(worst.max()) < 3e-5


def test_rows_that_nothing_depends_on() -> None:
    assert first_rows(512, band=64, pool=4) == [0, 0, 0, 0, 4, 13, 30]
    assert first_rows(1024, band=0, pool=4) == [0] * 8
    # The last block starts at a whole window of the pooling.
    assert all(2 * first_rows(1024, band, 8)[-1] % 8 == 0 for band in range(256))


@pytest.mark.parametrize("pool", [1, 2, 4, 8])
def test_enlarging_and_pooling_are_one_filter(pool: int) -> None:
    image, kernel = small.draw("skip", (2, 3, 16, 8)), lopsided("upsample_skip")
    expected = F.avg_pool2d(upfirdn(image, kernel, up=2, pad=(2, 1)), pool)
    assert relative_error(SkipUpsample(kernel, pool)(image), expected) < CLOSE


@pytest.mark.parametrize("upsample", [False, True])
@torch.no_grad()
def test_static_weights(upsample: bool) -> None:
    layer = StyledConv(6, 5, style_dim=7, upsample=upsample)
    layer.load_state_dict(small.weights(layer))
    if upsample:
        layer.conv.blur.kernel.copy_(lopsided("blur"))
    x, style = small.draw("features", (3, 6, 4, 5)), small.draw("style", (3, 7))
    noise = small.draw("layer noise", (1, 1, 8, 10) if upsample else (1, 1, 4, 5))
    assert relative_error(StaticConv(layer, noise)(x, style), layer(x, style, noise)) < CLOSE


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(16, 32, 2), (32, 32, 2), (32, 32, 1)])
@torch.no_grad()
def test_folded_unit(inputs: int, outputs: int, stride: int) -> None:
    unit = Unit(inputs, outputs, stride)
    unit.load_state_dict(small.weights(unit))
    unit.eval()
    x = small.draw("features", (2, inputs, 6, 8))
    assert relative_error(FoldedUnit(unit).eval()(x), unit(x)) < CLOSE


@torch.no_grad()
def test_attention_without_projected_pixels() -> None:
    layer = QueryLayer(16, 24)
    layer.load_state_dict(small.weights(layer))
    queries, features = small.draw("queries", (2, 5, 16)), small.draw("map", (2, 16, 3, 4))
    found = CrossAttention(layer)(SelfAttention(layer)(queries), features)
    assert relative_error(found, layer.eval()(queries, features)) < CLOSE


def test_another_family_is_refused(tmp_path: Path) -> None:
    model = purifier("e4e", tmp_path)
    unknown = type("Unknown", (StyleGan2Purifier,), {"encode": None, "image_size": 32})(
        model.encoder, model.decoder, model.latent_avg
    )
    with pytest.raises(TypeError, match="Unknown"):
        Encode(unknown)


@pytest.mark.parametrize(("family", "blur", "l2"), [("e4e", True, 2.0), ("style_transformer", False, 0.0)])
def test_onnx_files_at_several_batches(family: str, blur: bool, l2: float, tmp_path: Path) -> None:
    parts = stages(purifier(family, tmp_path), blur, l2)
    files = {stage.name: tmp_path / f"{stage.name}.onnx" for stage in parts}
    for stage in parts:
        trace(stage, files[stage.name])
    for runtime in ("onnxruntime", "openvino"):
        if runtime not in runtimes.installed():
            continue
        for found in compare_stages(parts, files, (1, 2, 3, 5), runtime):
            assert found.relative_error < 1e-5, (runtime, found)
    graph = onnx.load(files["encode"]).graph
    taps = [max(tensor.dims) for tensor in graph.initializer if len(tensor.dims) == 4 and 1 in tensor.dims[2:]]
    assert max(taps, default=0) <= 64, "the blur keeps taps that weigh nothing"


PUBLISHED: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "gender": ("e4e_ffhq_1024", read_e4e),
    "cars": ("style_transformer_cars_512", read_style_transformer),
}


@pytest.mark.full
@pytest.mark.parametrize("name", PUBLISHED)
def test_onnx_files_agree_with_the_official_modules(name: str, tmp_path: Path) -> None:
    manifest, read = PUBLISHED[name]
    expected = reference.outputs(f"{name}_blur_seed1")
    meta = json.loads(str(expected["meta"]))
    model: E4ePurifier | StyleTransformerPurifier = read(reference.checkpoint(manifest))
    reference.release(manifest)
    images = expected["images_u8"].astype(np.float32) / np.float32(255)
    noise = reference.draws.gaussian(1, f"{name}.purify.noise", (model.n_latents, len(images), 512))
    known: dict[str, Any] = {
        "images": images,
        "noise": noise.transpose(1, 0, 2),
        "alphas": np.float32(meta["interpolation_alphas"]) * np.float32(meta["alpha_attenuation"]),
    }
    for stage in stages(model, blur=True, input_noise_l2=0.0):
        file = tmp_path / f"{stage.name}.onnx"
        trace(stage, file)
        engine = runtimes.load("onnxruntime", file, runtimes.EngineOptions())
        known |= engine.run({key: known[key] for key in [spec.name for spec in stage.inputs]})
        engine.close()
        for path in tmp_path.iterdir():
            path.unlink()
    for key, array in (("codes", "codes"), ("mixed", "mixed"), ("images", "purified")):
        error = relative_error(known[key], expected[array])
        print(key, error)
        assert error < 1e-4, (key, error)
