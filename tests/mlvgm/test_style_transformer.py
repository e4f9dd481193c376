"""The Style Transformer purifier: its layers, its crops, and parity with the official modules at full size."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlvgm.resnet import ResNetClassifier, read_resnext50
from mlvgm.style_transformer import QueryLayer, StyleTransformerPurifier, read_style_transformer
from tests import reference
from tests.mlvgm import small

FIXTURE = Path(__file__).parent / "fixtures" / "style_transformer.npz"


@pytest.fixture(scope="module")
def purifier(tmp_path_factory: pytest.TempPathFactory) -> StyleTransformerPurifier:
    return read_style_transformer(small.save(small.style_transformer(), tmp_path_factory.mktemp("st")))


def test_outputs_stay_as_recorded(purifier: StyleTransformerPurifier) -> None:
    # Recorded when the code matched the official modules at full size; made by tests/mlvgm/fixtures/record.py.
    with np.load(FIXTURE) as expected:
        purified = small.purify(purifier, blur=True)
        for name, value in small.summary(purified).items():
            assert reference.relative_error(value, expected[name]) < 1e-5, name


def plain_layer_norm(x: Tensor, values: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    scaled = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-5)
    return scaled * values[f"{name}.weight"] + values[f"{name}.bias"]


def plain_attention(queries: Tensor, tokens: Tensor, values: dict[str, Tensor], name: str) -> Tensor:
    """Four heads, one at a time, over (B, n, d) and (B, m, d)."""
    dim = queries.shape[-1]
    in_weight, in_bias = values[f"{name}.in_proj_weight"], values[f"{name}.in_proj_bias"]
    q, k, v = (
        x @ in_weight[i * dim : (i + 1) * dim].T + in_bias[i * dim : (i + 1) * dim]
        for i, x in enumerate((queries, tokens, tokens))
    )
    width, heads = dim // 4, []
    for start in range(0, dim, width):
        own = slice(start, start + width)
        scores = torch.softmax(q[..., own] @ k[..., own].transpose(1, 2) / width**0.5, dim=-1)
        heads.append(scores @ v[..., own])
    return torch.cat(heads, dim=-1) @ values[f"{name}.out_proj.weight"].T + values[f"{name}.out_proj.bias"]


def test_query_layer_matches_formula() -> None:
    layer = QueryLayer(16, 24)
    layer.load_state_dict(small.weights(layer))
    layer.eval().requires_grad_(False)
    values = {key: value.double() for key, value in layer.state_dict().items()}
    queries, features = small.draw("queries", (2, 5, 16)), small.draw("map", (2, 16, 3, 4))

    tokens = features.double().permute(0, 2, 3, 1).reshape(2, 12, 16)
    x = queries.double()
    x = plain_layer_norm(x + plain_attention(x, x, values, "self_attn"), values, "norm1")
    x = plain_layer_norm(x + plain_attention(x, tokens, values, "multihead_attn"), values, "norm2")
    hidden = (x @ values["linear1.weight"].T + values["linear1.bias"]).clamp(min=0)
    x = plain_layer_norm(x + hidden @ values["linear2.weight"].T + values["linear2.bias"], values, "norm3")
    assert reference.relative_error(layer(queries, features), x) < 2e-6


def test_encoder_sees_the_cropped_canvas(purifier: StyleTransformerPurifier) -> None:
    seen: list[Tensor] = []
    hook = purifier.encoder.input_layer.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0]))
    images = small.images("canvas", 2, 128)
    (codes,) = purifier.encode(images)
    hook.remove()
    assert codes.shape == (2, 8, 16)
    assert seen[0].shape == (2, 3, 192, 256)
    # Doubling without aligned corners puts the new pixels a quarter of the way to the neighbour.
    row, nearer, farther = seen[0][:, :, 0], images[:, :, 16], images[:, :, 15]
    mixed = 2 * (0.75 * nearer + 0.25 * farther) - 1
    torch.testing.assert_close(row[..., 2:-1:2], 0.75 * mixed[..., 1:] + 0.25 * mixed[..., :-1])
    # The outer rows never reach the encoder.
    images[:, :, :15] = 0
    torch.testing.assert_close(purifier.encode(images)[0], codes)


def test_bands_are_black_and_the_rest_is_pooled(purifier: StyleTransformerPurifier) -> None:
    codes = small.draw("codes", (2, 8, 16))
    images = purifier.decode(codes)
    assert images.shape == (2, 3, 128, 128)
    assert torch.equal(images[:, :, :16], torch.zeros(2, 3, 16, 128))
    assert torch.equal(images[:, :, -16:], torch.zeros(2, 3, 16, 128))
    raw = purifier.decoder(codes) * 0.5 + 0.5  # 32 pixels, each of which fills 4 x 4 of the result
    expected = raw.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    torch.testing.assert_close(images[:, :, 16:-16], expected[:, :, 16:-16])


def test_prior_is_narrower_before_the_mapping_network(purifier: StyleTransformerPurifier) -> None:
    noise = 1e-4 * small.draw("noise", (2, 8, 16))  # small enough for the norm's epsilon to show the factor
    fresh = purifier.resample(torch.zeros(2, 8, 16), noise, torch.ones(8))
    torch.testing.assert_close(fresh, purifier.decoder.map(0.8 * noise))
    assert not torch.allclose(fresh, purifier.decoder.map(noise), rtol=1e-3)


def test_size_is_read_off_the_tensors_when_the_options_lack_it(tmp_path: Path) -> None:
    checkpoint = small.style_transformer(64)
    del checkpoint["opts"]["output_size"], checkpoint["opts"]["learn_in_w"]
    assert read_style_transformer(small.save(checkpoint, tmp_path)).decoder.size == 64


Pair = tuple[StyleTransformerPurifier, ResNetClassifier]


@pytest.fixture(scope="module")
def published() -> Iterator[Pair]:
    yield (
        read_style_transformer(reference.checkpoint("style_transformer_cars_512")),
        read_resnext50(reference.checkpoint("resnext50_cars"), 4),
    )
    reference.release("style_transformer_cars_512")


@pytest.mark.full
@pytest.mark.parametrize("variant", ["no_preprocessing", "blur", "noise"])
@torch.no_grad()
def test_parity_with_the_official_modules(variant: str, published: Pair) -> None:
    purifier, classifier = published
    expected = reference.outputs(f"cars_{variant}_seed1")
    errors, purified = reference.compare(purifier, classifier, expected)
    raw = purifier.decoder(torch.stack(purified.mixed, dim=1))[:, :, 192:320, 192:320]
    errors["generator_crop"] = reference.relative_error(raw, expected["generator_crop"])
    query = purifier.decoder.map(purifier.encoder.z).expand(2, -1, -1).reshape(32, 512)
    errors["query"] = reference.relative_error(query, expected["query"])
    print(json.dumps(errors))
    assert max(errors.values()) < 1e-4, errors
