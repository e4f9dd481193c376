"""One purifier with drawn weights on a device: its stages under each technique, and whole answers."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import synthetic
from benchmarks.gpu.bench import Bench, Measured, compared
from evaluation.photographs import soft_pictures
from export import classifier as classify
from export import families
from export.compare import run_reference
from export.engines.programs import for_gpu
from export.precision import LIMITS, to_fp16
from export.stage import Stage
from export.trace import example
from handlers.manifest import Batch, Manifest, Samples, StageSpec
from handlers.pipeline import Pipeline
from handlers.runtimes.cuda_graphs import Computation, CudaGraphs
from handlers.runtimes.device import DeviceArray
from handlers.runtimes.torch import CpuProgram, Function, without_tf32
from mlvgm.e4e import E4ePurifier, Encoder4Editing
from mlvgm.irse import Widths
from mlvgm.nvae import NVAE, NVAEConfig, NVAEPurifier
from mlvgm.purifier import Purifier
from mlvgm.resnet import ResNetClassifier
from mlvgm.stylegan2 import PUBLISHED_CHANNELS, Generator

Tensors = dict[str, Tensor]

TOY_NVAE = NVAEConfig(16, (1, 2), 1, 2, 0, channels=4, blocks=1, cells_per_block=1, mixtures=2)
_E4E = (PUBLISHED_CHANNELS, 512, synthetic.PUBLISHED), ((16, 12, 8, 8), 16, Widths(4, 4, 8, 8, 16))
_ROWS, _SETS = 32, 4  # rows of which inputs are made, and in how many orders


def purifier_of(family: str, device: torch.device, toy: bool) -> Purifier:
    """An "e4e" or "nvae" purifier of the published size, drawn on ``device``."""

    def normal(name: str, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator, device=device)

    with device, torch.no_grad():
        if family == "nvae":
            torch.manual_seed(0)
            return NVAEPurifier(NVAE(TOY_NVAE if toy else synthetic.CELEBA_64)).eval().requires_grad_(False)
        channels, dim, widths = _E4E[toy]
        generator = Generator(channels, dim)
        encoder, n = Encoder4Editing(widths, generator.n_latents, dim), generator.n_latents
        both = nn.ModuleDict({"encoder": encoder, "decoder": generator})
        both.load_state_dict(synthetic.weights(both, normal), assign=True)
        return E4ePurifier(encoder, generator, 0.3 * normal("latent_avg", (n, dim))).eval().requires_grad_(False)


def laid_out(what: Any, words: Sequence[str] | str) -> Any:
    """A tensor or a module's filters in the layout that ``words`` say."""
    return what.to(memory_format=torch.channels_last if "nhwc" in words else torch.contiguous_format)


class Models:
    """One family's purifier and a classifier, and what is measured of them."""

    def __init__(self, family: str, bench: Bench) -> None:
        self.family, self.bench = family, bench
        self.purifier = purifier_of(family, bench.device, bench.toy)
        self.stages = {stage.name: stage for stage in families.stages(self.purifier, False, 0.0)}
        without_tf32()

    def measure(self, name: str, words: Sequence[str], rows: int) -> Measured:
        """A stage by the technique that ``words`` say (`benchmarks.gpu.cases`), against its published operators."""
        stage = self.stages[name]
        function = self._function(stage, words)
        run: Callable[[Tensors], Tensors] = torch.no_grad()(function)
        if "graph" in words and not self.bench.toy:
            run = self._recorded(function)
        given = [self._rows([spec.name for spec in stage.inputs], rows, i) for i in range(_SETS)]

        def call(i: int) -> Tensors:
            return run(given[i % _SETS])

        row = self.bench.clock(call, rows)
        # Not the inputs of the call before: what is left over from it would be found wrong.
        found, last = call(row["repeats"] + 2), (row["repeats"] + 2) % _SETS
        expected = self._rows([f"{name}.{output}" for output in found], rows, last)
        row |= compared(list(found.values()), list(expected.values()), LIMITS["fp16" if "half" in words else "fp32"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self._function(stage, ["rewritten"])(self._rows(function.inputs, 1, 0))
        row["tflops"] = counter.get_total_flops() * rows / row["ms"] / 1e9
        return row | (self.bench.profile(call)[0] if "profile" in words else {})

    def answers(self, words: Sequence[str], most: int, rows: int) -> Measured:
        """Whole answers of 32 samples in the product's pipeline, in calls of ``most`` rows at most."""
        last = classifier_stage(self.purifier, self.bench.toy)
        manifest = drawn(self.family, self.purifier, last, most, self.bench.toy)
        folded = last.module().to(self.bench.device)  # type: ignore[union-attr]
        stages = (*self.stages.values(), replace(last, module=lambda: folded))
        functions = {stage.name: self._function(stage, words) for stage in stages}
        engine: Any = CpuProgram if self.bench.toy else self._graphs
        engines = {name: engine(function) for name, function in functions.items()}
        with Pipeline(manifest, engines, "torch") as pipeline:
            return answered(self.bench, pipeline, rows, manifest.samples.max)

    @cached_property
    def _known(self) -> Tensors:
        """Inputs of every stage, and its published outputs under "STAGE.OUTPUT" as well, for `_ROWS` rows."""
        known: Tensors = {}
        for stage in self.stages.values():
            for i, spec in enumerate(stage.inputs):
                known.setdefault(spec.name, example(spec, _ROWS, seed=i).to(self.bench.device))
            outputs = {name: tensor.clone() for name, tensor in run_reference(stage, known).items()}
            known = {**outputs, **known, **{f"{stage.name}.{name}": tensor for name, tensor in outputs.items()}}
        return known

    def _rows(self, names: Sequence[str], rows: int, i: int) -> Tensors:
        """Some of the known rows, others for each i; of the alphas, which have none, all."""
        rolled = {name: self._known[name].roll(-_ROWS // _SETS * i, 0)[:rows] for name in names if name != "alphas"}
        return rolled | {name: self._known[name] for name in names if name == "alphas"}

    def _graphs(self, function: Function) -> CudaGraphs:
        return CudaGraphs(lambda given: Computation(partial(function, given)), self.bench.device)

    def _recorded(self, function: Function) -> Callable[[Tensors], Tensors]:
        graphs = self._graphs(function)

        def replay(tensors: Tensors) -> Tensors:
            found = graphs.run({name: DeviceArray(tensor) for name, tensor in tensors.items()})
            return {name: array.tensor for name, array in found.items()}

        return replay

    def _function(self, stage: Stage, words: Sequence[str]) -> Function:
        torch.backends.cudnn.benchmark = "search" in words
        module: Any = stage.reference
        if "published" not in words:
            with self.bench.device, torch.no_grad():
                stage = to_fp16(stage) if "half" in words else stage
                module = (for_gpu(stage) if "shifted" in words else stage).module()
            module = laid_out(module.eval().requires_grad_(False), words)
            if "compiled" in words and stage.name in ("encode", "decode"):  # no other is worth a compiler's minute
                module = torch.compile(
                    module, dynamic=False, fullgraph=True, backend="eager" if self.bench.toy else "inductor"
                )
        return Function(module, [spec.name for spec in stage.inputs], [spec.name for spec in stage.outputs])


def classifier_stage(purifier: Purifier, toy: bool) -> Stage:
    """``classify`` by a ResNet-50 as it is initialised, on the CPU."""
    torch.manual_seed(0)
    classifier = ResNetClassifier(10, stem=4) if toy else ResNetClassifier(10)
    return classify.stage(classifier.eval().requires_grad_(False), purifier.image_size, 10)


def drawn(family: str, purifier: Purifier, last: Stage, most: int, toy: bool) -> Manifest:
    """Of a bundle of ``purifier`` and the classifier of ``last``, for calls of ``most`` rows at most."""
    side, n, samples = purifier.image_size, purifier.n_latents, 2 if toy else 32
    return Manifest(
        *("drawn", "1", family, (side, side), purifier.noise_shapes, {"half": (0.5,) * n}, "half"),
        samples=Samples(samples, samples),
        classes=tuple(map(str, range(10))),
        batch=Batch(1, most, most),
        stages=tuple(
            StageSpec(stage.name, f"{stage.name}.onnx", stage.inputs, stage.outputs)
            for stage in (*families.stages(purifier, False, 0.0), last)
        ),
        precision="fp16",
    )


def answered(bench: Bench, pipeline: Pipeline, rows: int, samples: int) -> Measured:
    """Times of whole answers for ``rows`` images; "idle" is the share in which the GPU has nothing to do."""
    images = [soft_pictures(rows, pipeline.manifest.image_size, seed) for seed in range(_SETS)]
    timing: dict[str, float] = {}

    def call(i: int) -> None:
        timing.update(pipeline.run(images[i % _SETS], samples, range(rows)).timing_ms)

    row = bench.clock(call, rows)
    if bench.toy:  # of the kernels of whole answers a CPU makes too many to write them all down
        return row | {"facts": {"stage_ms": timing}}
    kernels, busy = bench.profile(call)
    return row | kernels | {"facts": {"stage_ms": timing, "kernel_ms": busy, "idle": max(1 - busy / row["ms"], 0.0)}}
