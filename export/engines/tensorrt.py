"""From ONNX to TensorRT engines, strongly typed: the precision is the graph's, no flag changes it.

``tensorrt`` builds for the GPU at hand, ``tensorrt-rtx`` without any for the compute capabilities that it is told.
Each build is proven: a graph in half precision must come out with its convolutions and matrix products in half.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from handlers.errors import MlvgmError
from handlers.manifest import Batch, Manifest
from handlers.runtimes import engine_store
from handlers.runtimes.tensorrt import library

HALF_SHARE = 0.5
"""Of the numbers that convolutions and matrix products give, what must be half in a stage of half precision."""

TARGETS = ("8.6", "8.9", "12.0")
"""Compute capabilities that tensorrt-rtx builds for where no others are named: Ampere, Ada, Blackwell workstations."""

_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")


class BuildError(MlvgmError):
    """An engine cannot be built, or is not what was asked for."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is: equal infos, equal engines.

    Attributes:
        graph: SHA-256 of the ONNX file and its weights.
        targets: compute capabilities of the GPUs that it runs on.
        profile: rows: min, opt, max.
    """

    graph: str
    library: str
    version: str
    targets: tuple[str, ...]
    profile: tuple[int, int, int]
    flags: tuple[str, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def build_bundle(
    bundle: Path,
    name: str = "tensorrt-rtx",
    targets: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Build engines of every stage of ``bundle`` into its folder ``engines``, and write its manifest again.

    Raises:
        BundleError: the bundle is damaged.
        RuntimeMissing: the library is not installed.
        BuildError: a graph is refused, or an engine is not in the precision of its graph.
    """
    manifest = Manifest.read(bundle)
    engines = {}
    for stage in manifest.stages:
        progress(f"building {stage.name} with {name}")
        engines[stage.name] = build(bundle / stage.file, bundle / engine_store.FOLDER, manifest.batch, name, targets)
    return with_engines(bundle, manifest, name, engines)


def with_engines(bundle: Path, manifest: Manifest, name: str, engines: Mapping[str, Path]) -> Manifest:
    """Drop what is stale, and write the manifest again; its report tells which engines, by stage, ``name`` built."""
    folder = bundle / engine_store.FOLDER
    graphs = {engine_store.digest(bundle / stage.file) for stage in manifest.stages}
    for stem in {path.with_suffix("") for path in folder.glob("*-*.*") if path.suffix != ".cache"}:
        if stem.with_suffix(".engine") in engines.values():
            continue
        try:
            of = engine_store.read_info(stem)
            stale = of["library"] == name or of["graph"] not in graphs
        except (OSError, ValueError, KeyError):
            stale = True
        for path in folder.glob(f"{stem.name}.*") if stale else ():
            path.unlink()
    infos = {stage: engine_store.read_info(engine) for stage, engine in engines.items()}
    shares = {stage: info["half_share"] for stage, info in infos.items()}
    version = next(iter(infos.values()))["version"]
    report = {**manifest.report, name: {"version": version, "half_share": shares}}
    return replace(manifest, report=report).write(bundle)


def build(file: Path, folder: Path, batch: Batch, name: str = "tensorrt-rtx", targets: Sequence[str] = ()) -> Path:
    """The engine of ``file`` in ``folder``: the one that is there if it is just that, else a new one.

    Args:
        batch: rows per call: min, opt, max.
        targets: compute capabilities such as "8.9"; only tensorrt-rtx can build for other GPUs than the one at hand.

    Raises:
        RuntimeMissing: the library is not installed.
        BuildError: the graph is refused, or the engine is not in the precision of its graph.
    """
    trt = library(name)
    found = (tuple(targets) or TARGETS) if name == "tensorrt-rtx" else (capability(),)
    if name != "tensorrt-rtx" and targets and tuple(targets) != found:
        raise BuildError(f"tensorrt builds for the GPU at hand ({found[0]}), not for {', '.join(targets)}")
    profile = (batch.min, batch.opt, batch.max)
    info = EngineInfo(engine_store.digest(file), name, trt.__version__, found, profile, ("STRONGLY_TYPED", "NO_TF32"))
    return cached(file, folder, info, lambda: _build(trt, file, info, folder))


def cached(
    file: Path, folder: Path, info: EngineInfo, build: Callable[[], tuple[bytes, float | None]], **names: Any
) -> Path:
    """The engine of ``file`` in ``folder`` that ``info`` describes; if it is not there undamaged, it is built first.

    Args:
        build: gives the engine and its share of half products.
        names: what else the runtime must know.
    """
    engine = folder / f"{file.stem}-{info.key}.engine"
    if engine_store.is_intact(engine, asdict(info)):
        return engine
    folder.mkdir(parents=True, exist_ok=True)
    plan, share = build()
    engine.write_bytes(plan)
    engine_store.write_info(engine, {**asdict(info), **names, "half_share": share})
    return engine


def _build(trt: ModuleType, file: Path, info: EngineInfo, folder: Path) -> tuple[bytes, float | None]:
    """The serialised engine, and its share of half products (None for a graph without half tensors)."""
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildError(f"{file}: {info.library} cannot parse it: {'; '.join(errors)[:500]}")
    tensors = _tensors(trt, network, info.profile[1])
    wants_half = any(half for _, half, _ in tensors)  # a user's own ONNX classifier keeps its precision
    parsed = half_share(tensors)
    if wants_half and parsed < HALF_SHARE:
        raise BuildError(_too_little(file, parsed, "parsed network"))

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: ten bits for what is fp32 because it needs them
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the inspector names no types
    if info.library == "tensorrt-rtx":
        config.num_compute_capabilities = len(info.targets)
        for i, target in enumerate(info.targets):
            config.set_compute_capability(_capability_of(trt, target), i)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *([b if n < 0 else n for n in tensor.shape] for b in info.profile))
    config.add_optimization_profile(profile)
    timings = folder / f"timing-{info.version}-{info.targets[0]}.cache"
    if info.library == "tensorrt":  # TensorRT-RTX tunes on the user's machine, and keeps no timings
        use_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{file}: {info.library} cannot build it: {'; '.join(logger.errors)[:500]}")
    if info.library == "tensorrt":
        timings.write_bytes(bytes(config.get_timing_cache().serialize()))
    plan = bytes(plan)
    share = proven_half(trt, file, plan) if wants_half and info.library == "tensorrt" else None
    return plan, (parsed if share is None else share) if wants_half else None


def use_timings(config: Any, file: Path) -> None:
    """Let the builder time no kernel twice: from the cache in ``file``, or a new one if that is of another GPU."""
    known = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def proven_half(trt: ModuleType, file: Path, plan: bytes) -> float | None:
    """Share of half that the inspector finds in ``plan``, an engine of ``file``; None where it tells none.

    Raises:
        BuildError: it is too little.
    """
    share = _inspected(trt, _logger(trt), plan)
    if share is not None and share < HALF_SHARE:
        raise BuildError(_too_little(file, share, "engine"))
    return share


def _too_little(file: Path, share: float, what: str) -> str:
    return (
        f"{file}: only {share:.0%} of the {what}'s products are half, {HALF_SHARE:.0%} are wanted: "
        "the engine would run in fp32 under the name of fp16"
    )


def half_share(tensors: Sequence[tuple[bool, bool, int]]) -> float:
    """Share of half among (product, half, size) of tensors of floating point: of the products, by size."""
    products = [(half, size) for product, half, size in tensors if product]
    return sum(size for half, size in products if half) / max(sum(size for _, size in products), 1)


def _tensors(trt: ModuleType, network: Any, batch: int) -> list[tuple[bool, bool, int]]:
    """(of a product, half, numbers at this batch) for each layer's first output of floating point."""
    found = []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        tensor = layer.get_output(0)
        if tensor is None or tensor.dtype not in (trt.float16, trt.float32):
            continue
        size = 1
        for n in tensor.shape if len(tensor.shape) else ():
            size *= batch if n < 0 else n
        found.append((layer.type.name in _PRODUCTS, tensor.dtype == trt.float16, size))
    return found


def _inspected(trt: ModuleType, logger: Any, plan: bytes) -> float | None:
    """Share of half among the numbers that the engine's layers give, by its inspector; None without a device."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    layers = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    return inspected_share(layers.get("Layers", []))


def inspected_share(layers: Sequence[Any]) -> float | None:
    """Share of half among the numbers of floating point that an inspector's layers give; None where it tells none."""
    tensors = []
    for layer in layers:
        for output in layer.get("Outputs", ()) if isinstance(layer, dict) else ():
            # TensorRT 11 writes "DataType", with the format apart; those before it one of the others.
            kind = " ".join(str(output.get(key, "")) for key in ("Format/Datatype", "Datatype", "DataType"))
            if any(word in kind for word in ("Half", "FP16", "Float", "FP32")):
                size = 1
                for n in output.get("Dimensions", ()):
                    size *= max(int(n), 1)
                tensors.append((True, "Half" in kind or "FP16" in kind, size))
    return half_share(tensors) if tensors else None


def capability() -> str:
    """Compute capability of the GPU at hand, such as "9.0"."""
    import torch

    if not torch.cuda.is_available():
        raise BuildError("tensorrt builds for the GPU at hand, and there is none; tensorrt-rtx builds without one")
    return ".".join(map(str, torch.cuda.get_device_capability()))


def _capability_of(trt: ModuleType, target: str) -> Any:
    member = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", None)
    if member is None:
        known = sorted(name for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        raise BuildError(f"tensorrt-rtx cannot build for compute capability {target}; it knows {', '.join(known)}")
    return member


def _logger(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        """Keeps the errors for the exception, instead of printing them."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()
