"""Build TensorRT engines from ONNX graphs. Engines are strongly typed: their precision is that of the graph.

``tensorrt`` builds for the GPU of this machine, ``tensorrt-rtx`` without a GPU for given compute capabilities. Every
build is checked: in the engine of a graph in half precision, most convolutions and matrix products must be in fp16.
"""

import hashlib
import json
import math
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
"""Share of the outputs of convolutions and matrix products that must be fp16 in a stage in half precision."""

TARGETS = ("8.6", "8.9", "12.0")
"""Default compute capabilities for tensorrt-rtx: workstation GPUs of Ampere, Ada and Blackwell."""

_PRODUCTS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")


class BuildError(MlvgmError):
    """An engine cannot be built, or is not in the precision of its graph."""


@dataclass(frozen=True)
class EngineInfo:
    """Everything that an engine depends on; an engine with equal info need not be built again.

    Attributes:
        graph: SHA-256 of the ONNX file and its weights.
        targets: compute capabilities of the GPUs that it runs on.
        profile: batch sizes: min, opt, max.
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
    """Build an engine of every stage of ``bundle`` in its folder ``engines``, and update its manifest.

    Raises:
        BundleError: the bundle is damaged.
        RuntimeMissing: the library is not installed.
        BuildError: the library refuses a graph, or an engine is not in the precision of its graph.
    """
    manifest = Manifest.read(bundle)
    engines = {}
    for stage in manifest.stages:
        progress(f"building {stage.name} with {name}")
        engines[stage.name] = build(bundle / stage.file, bundle / engine_store.FOLDER, manifest.batch, name, targets)
    return with_engines(bundle, manifest, name, engines)


def with_engines(bundle: Path, manifest: Manifest, name: str, engines: Mapping[str, Path]) -> Manifest:
    """Delete stale engines of ``bundle``, and update its manifest, whose report gets the entry ``name``."""
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
    """Path of the engine of ``file`` in ``folder``, which is built if there is none with the same `EngineInfo`.

    Args:
        targets: compute capabilities such as "8.9"; only tensorrt-rtx builds for other GPUs than that of this machine.

    Raises:
        RuntimeMissing: the library is not installed.
        BuildError: the library refuses the graph, or the engine is not in the precision of its graph.
    """
    trt, found = library(name), targets_of(name, targets)
    profile = (batch.min, batch.opt, batch.max)
    info = EngineInfo(engine_store.digest(file), name, trt.__version__, found, profile, ("STRONGLY_TYPED", "NO_TF32"))
    return cached(file, folder, info, lambda: _build(trt, file, info, folder))


def targets_of(name: str, targets: Sequence[str] = ()) -> tuple[str, ...]:
    """The compute capabilities that an engine is built for, as for `build`.

    Raises:
        RuntimeMissing: the library is not installed.
        BuildError: it cannot build for them here.
    """
    trt = library(name)
    if name == "tensorrt-rtx":
        for target in targets:
            _capability_of(trt, target)
        return tuple(targets) or TARGETS
    found = (capability(),)
    if targets and tuple(targets) != found:
        raise BuildError(f"tensorrt builds for this machine's GPU ({found[0]}), not for {', '.join(targets)}")
    return found


def cached(
    file: Path, folder: Path, info: EngineInfo, build: Callable[[], tuple[bytes, float | None]], **names: Any
) -> Path:
    """Path of the engine of ``file`` in ``folder`` that ``info`` describes, which is built if missing or damaged.

    Args:
        build: returns the serialised engine and its share of fp16 (see `HALF_SHARE`).
        names: further entries of the engine's JSON file.
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
    """The serialised engine, and its share of fp16 (None for a graph without fp16 tensors)."""
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildError(f"{file}: {info.library} cannot parse it: {'; '.join(errors)[:500]}")
    share = _network_share(trt, network, info.profile[1])
    _check_half(file, share, "parsed network")

    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; too imprecise for the fp32 regions
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise the inspector gives no types
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
    if info.library == "tensorrt":  # TensorRT-RTX tunes when it loads the engine
        use_timings(config, timings)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{file}: {info.library} cannot build it: {'; '.join(logger.errors)[:500]}")
    if info.library == "tensorrt":
        timings.write_bytes(bytes(config.get_timing_cache().serialize()))
    if share is not None and info.library == "tensorrt":
        share = proven_half(trt, file, bytes(plan)) or share
    return bytes(plan), share


def use_timings(config: Any, file: Path) -> None:
    """Give the builder the timing cache in ``file``, or a new one if that is missing, damaged or of another GPU."""
    known = file.read_bytes() if file.is_file() else b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _network_share(trt: ModuleType, network: Any, batch: int) -> float | None:
    """Share of fp16 in the outputs of convolutions and matrix products of a network; None if no tensor is fp16."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    outputs = [(layer.type.name in _PRODUCTS, layer.get_output(0)) for layer in layers]
    if not any(tensor is not None and tensor.dtype == trt.float16 for _, tensor in outputs):
        return None  # an ONNX classifier, for example, keeps its precision
    products = [tensor for product, tensor in outputs if product]
    return half_share([(t.dtype == trt.float16, math.prod(batch if n < 0 else n for n in t.shape)) for t in products])


def proven_half(trt: ModuleType, file: Path, plan: bytes) -> float | None:
    """Share of fp16 in the layer outputs of ``plan``, an engine of ``file``, by TensorRT's inspector; None if unknown.

    Raises:
        BuildError: it is below `HALF_SHARE`.
    """
    engine = trt.Runtime(_logger(trt)).deserialize_cuda_engine(plan)
    if engine is None:  # no device
        return None
    layers = json.loads(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    share = inspected_share(layers.get("Layers", []))
    _check_half(file, share, "engine")
    return share


def inspected_share(layers: Sequence[Any]) -> float | None:
    """Share of fp16 among the floating-point outputs in the inspector's list of layers; None if it lists none."""
    tensors = []
    for layer in layers:
        for output in layer.get("Outputs", ()) if isinstance(layer, dict) else ():
            # TensorRT 11 has "DataType", with the format in another field; earlier versions have one of the others.
            kind = " ".join(str(output.get(key, "")) for key in ("Format/Datatype", "Datatype", "DataType"))
            if any(word in kind for word in ("Half", "FP16", "Float", "FP32")):
                size = math.prod(max(int(n), 1) for n in output.get("Dimensions", ()))
                tensors.append(("Half" in kind or "FP16" in kind, size))
    return half_share(tensors) if tensors else None


def half_share(tensors: Sequence[tuple[bool, int]]) -> float:
    """Share of fp16 among tensors, each given as (whether it is fp16, number of elements)."""
    return sum(size for half, size in tensors if half) / max(sum(size for _, size in tensors), 1)


def _check_half(file: Path, share: float | None, what: str) -> None:
    if share is not None and share < HALF_SHARE:
        raise BuildError(
            f"{file}: only {share:.0%} of the {what}'s convolutions and matrix products are fp16, at least "
            f"{HALF_SHARE:.0%} must be: the engine would run in fp32 although its stage is fp16"
        )


def capability() -> str:
    """Compute capability of this machine's GPU, such as "9.0"."""
    import torch

    if not torch.cuda.is_available():
        raise BuildError("tensorrt builds for this machine's GPU, and there is none; tensorrt-rtx builds without one")
    return ".".join(map(str, torch.cuda.get_device_capability()))


def _capability_of(trt: ModuleType, target: str) -> Any:
    member = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", None)
    if member is None:
        known = sorted(name for name in trt.ComputeCapability.__members__ if name.startswith("SM"))
        raise BuildError(f"tensorrt-rtx cannot build for compute capability {target}; it knows {', '.join(known)}")
    return member


def _logger(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        """Collects errors for the exception instead of printing them."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()
