"""Half precision holds: what overflows or rounds away in plain fp16 does not in the exported form."""

import copy
import dataclasses
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export import families
from export.bundle import export_bundle
from export.families.stylegan2 import Decode, Resample, StaticConv
from export.families.stylegan2_encoders import CrossAttention, FoldedUnit
from export.precision import Affine, Excite, fp16_layer, fp16_stage
from export.single_graph import REPORT, add_single_graph
from export.stage import Stage, as_tuple
from export.trace import example
from handlers.manifest import BundleError, Manifest
from handlers.pipeline import Pipeline
from mlvgm.irse import Unit
from mlvgm.stylegan2 import StyledConv
from tests.export import models
from tests.export.families.test_stylegan2 import FAMILIES, purifier
from tests.mlvgm import small
from tests.mlvgm.conftest import one_thread  # noqa: F401  (small models here, too)
from tests.reference import relative_error

CLOSE = 2e-3
"""Relative error of half precision on small models; one rounding is 5e-4 at most."""


def module(stage: Stage) -> nn.Module:
    return cast(nn.Module, stage.module())


def naive(whole: nn.Module, *tensors: Tensor) -> Tensor:
    """What ``whole`` gives when everything is cast, without islands."""
    with torch.no_grad():
        found: Tensor = copy.deepcopy(whole).half()(*(t.half() for t in tensors))
    return found.float()


@pytest.mark.parametrize(("styles", "weights"), [(1.0, 1.0), (3e3, 1.0), (1.0, 3e3), (1e3, 1e3), (1e-4, 1e-4)])
@pytest.mark.parametrize("upsample", [False, True])
@torch.no_grad()
def test_no_size_of_styles_or_weights_overflows(styles: float, weights: float, upsample: bool) -> None:
    torch.manual_seed(0)
    layer = StyledConv(64, 32, 16, upsample=upsample)
    layer.conv.weight.mul_(weights)
    layer.conv.modulation.weight.mul_(styles)
    layer.conv.modulation.bias.mul_(styles)
    side = 16 if upsample else 8
    conv = StaticConv(layer, 0.1 * torch.randn(1, 1, side, side))
    x, style = 20.0 * torch.randn(2, 64, 8, 8), torch.randn(2, 16)
    expected = conv(x, style)
    assert relative_error(fp16_layer(conv)(x.half(), style).float(), expected) < CLOSE
    if styles * weights > 1:  # or else the test tests nothing
        assert not relative_error(naive(conv, x, style), expected) < 0.5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_generator_with_outsized_styles(family: str, tmp_path: Path) -> None:
    model = purifier(family, tmp_path)
    mixed = small.draw("mixed", (2, model.n_latents, model.decoder.style_dim))
    for name, parameter in model.decoder.named_parameters():
        if "modulation" in name:
            parameter.mul_(1e4)
    decode = Decode(model)
    expected = decode(mixed)
    found = fp16_stage(decode)(mixed)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) < CLOSE
    assert not relative_error(naive(decode, mixed), expected) < 0.5


@torch.no_grad()
def test_small_noise_does_not_vanish_in_its_own_norm(tmp_path: Path) -> None:
    model = purifier("e4e", tmp_path)
    shape = (2, model.n_latents, model.decoder.style_dim)
    codes, noise, alphas = small.draw("codes", shape), 2e-4 * small.draw("noise", shape), torch.ones(shape[1])
    resample = Resample(model)
    expected = resample(codes, noise, alphas)
    assert relative_error(fp16_stage(resample)(codes, noise, alphas), expected) < CLOSE
    assert not relative_error(naive(resample, codes, noise, alphas), expected) < 0.02


@torch.no_grad()
def test_attention_with_large_scores_stays_fp32(tmp_path: Path) -> None:
    model = purifier("style_transformer", tmp_path)
    for name, parameter in model.encoder.named_parameters():
        if "multihead_attn.in_proj" in name:
            parameter.mul_(3e3)
    encode = module(families.stages(model, False, 0.0)[0])
    half = fp16_stage(encode)
    seen: list[torch.dtype] = []
    for part in half.modules():
        if isinstance(part, CrossAttention):
            part.register_forward_hook(lambda _, given, out: seen.extend(t.dtype for t in (*given, out)))
    images = small.images("half", 2, model.image_size)
    assert bool(torch.isfinite(half(images)).all())
    assert seen == [torch.float32] * 9
    assert not bool(torch.isfinite(naive(encode, images)).all())


@torch.no_grad()
def test_a_gate_adds_up_more_than_half_precision_can_hold() -> None:
    """Means are taken in fp32: in fp16 a sum of 65536 pixels is beyond the largest number, or stops growing."""
    gate = Excite(nn.Unflatten(1, (-1, 1, 1)))
    x = torch.full((1, 2, 256, 256), 3.0)
    x[:, :, ::2] = 3.5
    assert gate.gate(x.half().float().mean(dim=(2, 3))).dtype == torch.float32
    torch.testing.assert_close(gate(x.half()).float(), x * 3.25)
    seen: list[torch.dtype] = []
    gate.gate.register_forward_hook(lambda _, given, __: seen.append(given[0].dtype))
    gate(x.half())
    assert seen == [torch.float32]


@torch.no_grad()
def test_batch_norms_become_affine_maps_of_fp32_statistics() -> None:
    torch.manual_seed(0)
    unit = Unit(16, 16, 1)
    models.unsettle(unit)
    norm = cast(nn.BatchNorm2d, unit.res_layer[0])
    norm.running_var = torch.full((16,), 1e-7)  # nothing in half precision
    norm.running_mean = torch.zeros(16)
    norm.weight.mul_(1e-3)
    folded = FoldedUnit(unit)
    half = fp16_layer(folded)
    assert any(isinstance(part, Affine) for part in half.modules())
    x = torch.randn(2, 16, 8, 8)
    assert relative_error(half(x.half()).float(), folded(x)) < CLOSE


@torch.no_grad()
def test_nvae_keeps_its_distributions_in_fp32() -> None:
    """The codes that reach the decoder's tower are those of fp32 arithmetic, and everything a stage gives is fp32."""
    model = models.purifier()
    encode, decode = families.stages(model, False, 0.0)
    images, alphas = torch.rand(2, 3, 32, 32), torch.tensor([0.2, 0.5, 1.0])
    noise = [torch.randn(2, *shape) for shape in model.noise_shapes]
    features = as_tuple(encode.reference(images))
    for found, expected in zip(fp16_stage(module(encode))(images), features, strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < CLOSE
    half = fp16_stage(module(decode))
    seen: dict[str, torch.dtype] = {}
    for name, part in half.named_modules():
        if name.startswith(("flows.", "combiners.")) and name.count(".") == 1:
            part.register_forward_hook(lambda _, given, __, name=name: seen.update({name: given[-1].dtype}))
    found = half(*features, *noise, alphas)
    assert relative_error(found, decode.reference(*features, *noise, alphas)) < CLOSE
    assert set(seen.values()) == {torch.float32}
    assert len(seen) == 5


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 2])
def test_what_passes_between_the_stages_of_an_nvae_is_fp32(kept: int) -> None:
    for stage in families.stages(models.purifier(), False, 0.0, kept):
        given = [example(spec, 2, seed=i) for i, spec in enumerate(stage.inputs)]
        expected = as_tuple(stage.reference(*given))
        for found, wanted in zip(as_tuple(fp16_stage(module(stage))(*given)), expected, strict=True):
            assert found.dtype == torch.float32
            assert relative_error(found, wanted) < CLOSE


def test_the_reference_is_left_as_it_was() -> None:
    model = models.purifier()
    before = copy.deepcopy(model.state_dict())
    for stage in families.stages(model, False, 0.0):
        fp16_stage(module(stage))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("precision") / "half"
    export_bundle(dataclasses.replace(models.recipe(), precision="fp16"), models.purifier(), models.classifier(), out)
    return out


def test_a_bundle_in_half_precision_says_so_and_answers_alike(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    assert manifest.precision == "fp16"
    report = manifest.report["parity"]
    assert (report["precision"], report["limit"], report["runtime"]) == ("fp16", 5e-3, "onnxruntime")
    assert report["fp32_stages"] == {}
    worst = max(entry["relative_error"] for entry in report["worst"])
    assert 1e-6 < worst < 5e-3  # it is half precision, and it holds
    model = models.purifier()
    images, noise = torch.rand(3, 3, 32, 32), [torch.randn(3, *shape) for shape in model.noise_shapes]
    eager = model.purify(images, noise, models.recipe().effective_alphas())
    with Pipeline.load(bundle, runtime="onnxruntime") as pipeline:
        result = pipeline.run(images.numpy(), samples=1, noise=[t.numpy() for t in noise])
    assert result.logits.dtype == np.float32
    assert relative_error(result.purified[:, 0], eager.images) < CLOSE


def test_its_graphs_travel_in_fp32_too(bundle: Path) -> None:
    manifest = Manifest.read(bundle)
    report = manifest.report["parity_fallback"]
    assert (report["precision"], report["limit"]) == ("fp32", 1e-4)
    assert {entry["stage"] for entry in report["worst"]} == {"encode", "decode", "classify", "end to end"}
    for stage in manifest.stages:
        assert stage.fallback == f"{stage.name}.fp32.onnx"
        types = {tensor.data_type for tensor in onnx.load(bundle / stage.fallback).graph.initializer}
        assert onnx.TensorProto.FLOAT16 not in types
    images = torch.rand(3, 3, 32, 32).numpy()
    with Pipeline.load(bundle, runtime="onnxruntime") as pipeline:
        assert pipeline.fallback is not None
        half, single = (p.run(images, 1, [1, 2, 3]).purified for p in (pipeline, pipeline.fallback))
    assert 1e-6 < relative_error(half, torch.from_numpy(single)) < CLOSE


@pytest.mark.parametrize("name", ["encode", "decode", "classify"])
def test_graphs_multiply_in_half_and_take_and_give_single(bundle: Path, name: str) -> None:
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    graph = onnx.shape_inference.infer_shapes(onnx.load(bundle / f"{name}.onnx")).graph
    ends = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)]
    assert set(ends) == {single}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    convolutions = [types[node.output[0]] for node in graph.node if node.op_type == "Conv"]
    flows = 3 * 2 * 3 if name == "decode" else 0  # three latents, two steps each, three convolutions a step
    assert convolutions.count(single) == flows
    assert convolutions.count(half) > flows
    for node in graph.node:
        if node.op_type in ("Softmax", "Tanh", "Exp", "Clip"):
            assert types[node.output[0]] == single, node.name


def test_what_half_precision_cannot_hold_stays_fp32_and_is_reported(tmp_path: Path) -> None:
    class Large(nn.Module):
        """Its features are beyond the largest half, its logits are not."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return (1e6 * self.conv(images)).mean(dim=(2, 3)) / 1e6

    recipe = dataclasses.replace(models.recipe(), precision="fp16")
    manifest = export_bundle(recipe, models.purifier(), Large().eval(), tmp_path / "large")
    report = manifest.report["parity"]
    assert list(report["fp32_stages"]) == ["classify"]
    assert "logits is inf off" in report["fp32_stages"]["classify"]
    assert {entry["relative_error"] < 1e-5 for entry in report["worst"] if entry["stage"] == "classify"} == {True}
    assert [stage.fallback for stage in manifest.stages] == ["encode.fp32.onnx", "decode.fp32.onnx", ""]
    half = {tensor.data_type for tensor in onnx.load(tmp_path / "large" / "decode.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in half


def test_bf16_keeps_the_graphs_and_is_compared_as_openvino_computes_it(tmp_path: Path) -> None:
    """Their weights are stored in bf16 here, which both reports include."""
    pytest.importorskip("openvino")
    out = tmp_path / "bf16"
    recipe = dataclasses.replace(models.recipe(), precision="bf16", weights="bf16")
    manifest = export_bundle(recipe, models.purifier(), models.classifier(), out)
    for name, precision in (("parity", "fp32"), ("parity_bf16", "bf16")):
        report = manifest.report[name]
        assert (report["precision"], report["limit"]) == (precision, 3e-2)
        worst = {(entry["stage"], entry["output"]): entry for entry in report["worst"]}
        assert 1e-5 < worst["end to end", "logits"]["relative_error"] < 3e-2
        assert worst["end to end", "images"]["limit"] == 3e-2
        assert 0 <= worst["end to end", "logits"]["equal_labels"] <= 1
        assert worst["end to end", "images"]["equal_labels"] is None
    stored = []
    for stage in manifest.stages:
        graph = onnx.load(out / stage.file).graph
        halves = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.BFLOAT16}
        assert {node.op_type for node in graph.node if halves & {*node.input}} <= {"Cast"}
        stored += halves
    assert stored
    assert add_single_graph(out, 2).report[REPORT]["limit"] == 3e-2
    with pytest.raises(BundleError, match="weights is 'int8', must be fp32, fp16 or bf16"):
        dataclasses.replace(manifest, weights="int8").write(out)  # type: ignore[arg-type]
