"""OpenVINO on the CPU.

With a dynamic batch, shapes are inferred at every call, which for a small network takes as long as its layers. So a
small graph is compiled once per batch size, and the batch is split between cores, which then never wait for each other.
A large graph is compiled once with a dynamic batch: its layers take most of the time, and its weights gigabytes.

What is compiled of a small graph is kept for later starts, which then take a third of the time. It has the weights in
it, once for each batch size, so of a large graph nothing is kept.
"""

import contextlib
import io
import threading
from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from handlers import cores
from handlers.runtimes import Array, Engine, EngineOptions, cache, engine_errors, memory
from handlers.runtimes.widened import Widened

_KEPT = "openvino"  # folder of the cache


def load(file: Path, options: EngineOptions) -> Engine:
    """An engine of the graph ``file``; external data is loaded from its folder.

    Raises:
        EngineError: OpenVINO refuses the file.
    """
    settings: dict[str, Any] = {
        # A pinned thread waits for whatever else runs on its core: with one busy process, calls take five times longer.
        "ENABLE_CPU_PINNING": False,
        # By default, OpenVINO computes in bf16 where the CPU supports it, and exceeds the error limit of fp32.
        "INFERENCE_PRECISION_HINT": "bf16" if options.precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": options.threads or cores.usable(),
    }
    with engine_errors(f"{file}: OpenVINO cannot load it", RuntimeError):
        core = ov.Core()
        model = core.read_model(str(file))
        data = memory.external(file)
        with memory.sparing(partial(memory.forget, data)):
            widened = Widened(model)
        if memory.of_weights(file) + widened.bytes // 2 > memory.LARGE_BYTES:
            return DynamicEngine(core, model, settings, data, widened)
        return StaticEngine(core, model, settings, options.digest)


class DynamicEngine:
    """One compiled model for all batch sizes, run by all threads; inputs and outputs are numpy arrays.

    OpenVINO maps the external weights, and copies them into its own layouts at the first run. From then on it reads the
    copy. So pages of the file ``data`` and of the ``widened`` weights are given back while it does: else a worker would
    hold the weights twice. At the first run with more rows it lays out some of them once more, in a second or two.
    """

    takes_any_size = True

    def __init__(self, core: ov.Core, model: ov.Model, settings: dict[str, Any], data: Path, widened: Widened) -> None:
        self._data, self._widened, self._known = data, widened, set[tuple[int, ...]]()
        with memory.sparing(self._give_back):
            self._model = core.compile_model(model, "CPU", {**settings, "NUM_STREAMS": 1})

    @engine_errors("OpenVINO", RuntimeError)
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        rows = tuple(len(array) for array in feeds.values())
        with contextlib.nullcontext() if rows in self._known else memory.sparing(self._give_back):
            outputs = self._model(feeds, share_inputs=True)
        self._known.add(rows)
        return {name: array for port, array in outputs.items() for name in port.names}

    def close(self) -> None:
        del self._model

    def _give_back(self) -> None:
        memory.forget(self._data)
        self._widened.forget()


class StaticEngine:
    """One compiled model per batch size; inputs and outputs are numpy arrays.

    A batch that divides evenly among the threads is split into as many parts, each computed by one thread.

    Args:
        digest: of the graph; "" to keep nothing that is compiled.
    """

    takes_threads = True

    def __init__(self, core: ov.Core, model: ov.Model, settings: dict[str, Any], digest: str = "") -> None:
        self._core, self._model, self._settings, self._digest = core, model, settings, digest
        self._batched = {name for port in model.inputs if port.partial_shape[0].is_dynamic for name in port.names}
        self._compiled: dict[int, _Shares] = {}
        self._shares(1)  # so that a graph that cannot be compiled is refused when it is loaded

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = next(len(array) for name, array in inputs.items() if name in self._batched)
        return self._shares(rows).run(inputs, rows, self._batched)

    def close(self) -> None:
        del self._model
        self._compiled.clear()

    def _shares(self, rows: int) -> "_Shares":
        if rows not in self._compiled:
            threads = self._settings["INFERENCE_NUM_THREADS"]
            streams = 1 if rows % threads else threads
            compiled = self._compile(rows // streams, {**self._settings, "NUM_STREAMS": streams})
            self._compiled.setdefault(rows, _Shares(compiled, streams))
        return self._compiled[rows]

    def _compile(self, rows: int, settings: dict[str, Any]) -> ov.CompiledModel:
        """The graph compiled for ``rows`` rows, now or at an earlier start."""
        about = {"openvino": ov.get_version(), "cpu": cores.kind(), "rows": rows, "settings": settings}
        key = {"graph": self._digest, **about}
        if self._digest and (kept := cache.read(_KEPT, key)):
            with contextlib.suppress(RuntimeError):  # which no entry of this version should cause
                return self._core.import_model(kept, "CPU", settings)
        model = self._model.clone()
        model.reshape({port: _with_rows(port.partial_shape, rows) for port in model.inputs})
        compiled = self._core.compile_model(model, "CPU", settings)
        if self._digest:
            exported = io.BytesIO()
            compiled.export_model(exported)
            cache.write(_KEPT, key, exported.getvalue())
        return compiled


class _Shares:
    """The requests that compute a number of rows in equal parts, all at once."""

    def __init__(self, compiled: ov.CompiledModel, count: int) -> None:
        self._shares = [_Share(compiled.create_infer_request()) for _ in range(count)]
        self._lock = threading.Lock()

    @engine_errors("OpenVINO", (RuntimeError, ValueError, KeyError))
    def run(self, inputs: Mapping[str, Array], rows: int, batched: Container[str]) -> dict[str, Array]:
        """The outputs; the inputs that are ``batched`` have ``rows`` rows."""
        each = rows // len(self._shares)
        with self._lock:
            try:
                for i, share in enumerate(self._shares):
                    part = slice(i * each, (i + 1) * each)
                    share.start({name: array[part] if name in batched else array for name, array in inputs.items()})
            finally:
                failed = [failure for share in self._shares if (failure := share.failure())]
            if failed:
                raise failed[0]
            outputs: dict[str, Array] = {}
            for i, names in enumerate(self._shares[0].output_names):
                outputs |= dict.fromkeys(names, np.concatenate([share.outputs[i] for share in self._shares]))
        return outputs


class _Share:
    """A request of fixed shape. Its tensors are reused: to set new ones takes as long as a small layer."""

    def __init__(self, request: ov.InferRequest) -> None:
        self._request = request
        # A port has several names if OpenVINO has removed an operation without effect.
        self._inputs = [(port.names, request.get_tensor(port).data) for port in request.model_inputs]
        self.outputs = [request.get_tensor(port).data for port in request.model_outputs]
        self.output_names = [port.names for port in request.model_outputs]

    def start(self, inputs: Mapping[str, Array]) -> None:
        for names, own in self._inputs:
            name = next((name for name in inputs if name in names), min(names))
            if inputs[name].shape != own.shape:
                raise ValueError(f"{name} has shape {inputs[name].shape}, not {own.shape}")
            own[...] = inputs[name]
        self._request.start_async()

    def failure(self) -> RuntimeError | None:
        """Wait for the request, if it was started; returns its error, or None."""
        try:
            self._request.wait()
        except RuntimeError as error:
            return error
        return None


def _with_rows(shape: ov.PartialShape, rows: int) -> list[int]:
    return [rows if size.is_dynamic else size.get_length() for size in shape]
