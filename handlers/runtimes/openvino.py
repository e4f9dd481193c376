"""OpenVINO on the CPU.

A graph with a dynamic batch works its shapes out anew at every call: for a small network that takes as long as its
layers. So a small graph is compiled once for each number of rows it meets, and its rows are shared out between cores,
which then never wait for each other. A large one is compiled once: its layers are the time, its weights gigabytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov  # type: ignore[import-untyped]

from handlers import cores
from handlers.runtimes import Array, EngineError, Options

SMALL_BYTES = 64_000_000
"""Of weights: at most these are held once for each number of rows."""


def load(file: Path, options: Options) -> "OpenVinoEngine":
    """An engine of ``file`` (ONNX); external data is found beside it.

    Raises:
        EngineError: OpenVINO refuses the file.
    """
    settings: dict[str, Any] = {
        # A thread pinned to a core waits for whatever else runs there: with one busy neighbour, five times longer.
        "ENABLE_CPU_PINNING": False,
        # Left alone, OpenVINO computes in bf16 wherever the CPU can, and the answers drift away from the reference.
        "INFERENCE_PRECISION_HINT": "bf16" if options.precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": options.threads or cores.usable(),
    }
    weights = sum(path.stat().st_size for path in (file, file.with_name(f"{file.name}.data")) if path.is_file())
    try:
        core = ov.Core()
        model = core.read_model(str(file))
        if weights > SMALL_BYTES:
            return DynamicEngine(core, model, settings)
        return StaticEngine(core, model, settings)
    except RuntimeError as error:
        raise EngineError(f"{file}: OpenVINO cannot load it: {error}") from error


class OpenVinoEngine:
    """What both kinds share; inputs and outputs are numpy arrays."""

    def __init__(self, core: ov.Core, model: ov.Model, settings: dict[str, Any]) -> None:
        self._core, self._model, self._settings = core, model, settings
        self._batched = {port.any_name for port in model.inputs if port.partial_shape[0].is_dynamic}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        rows = next(len(array) for name, array in feeds.items() if name in self._batched)
        requests = self._requests(rows)
        share = rows // len(requests)
        try:
            for i, request in enumerate(requests):
                part = slice(i * share, (i + 1) * share)
                cut = {name: array[part] if name in self._batched else array for name, array in feeds.items()}
                request.start_async(cut, share_inputs=True)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO: {error}") from error
        finally:
            failed = _wait(requests)
        if failed:
            raise EngineError(f"OpenVINO: {failed[0]}") from failed[0]
        outputs: dict[str, Array] = {}
        for i, port in enumerate(requests[0].model_outputs):
            parts = [request.get_output_tensor(i).data for request in requests]
            array = np.concatenate(parts) if len(parts) > 1 else parts[0].copy()
            outputs |= dict.fromkeys(port.names, array)  # an output can go by several names
        return outputs

    def close(self) -> None:
        del self._model

    def _requests(self, rows: int) -> list[ov.InferRequest]:
        """Those that compute ``rows`` rows together, in equal shares."""
        raise NotImplementedError

    def _compile(self, model: ov.Model, streams: int) -> ov.CompiledModel:
        return self._core.compile_model(model, "CPU", {**self._settings, "NUM_STREAMS": streams})


class DynamicEngine(OpenVinoEngine):
    """One compiled model for any number of rows, with every thread on it."""

    def __init__(self, core: ov.Core, model: ov.Model, settings: dict[str, Any]) -> None:
        super().__init__(core, model, settings)
        self._request = self._compile(model, 1).create_infer_request()

    def close(self) -> None:
        super().close()
        del self._request

    def _requests(self, rows: int) -> list[ov.InferRequest]:
        return [self._request]


class StaticEngine(OpenVinoEngine):
    """A compiled model for each number of rows; where the cores can have equal shares, one stream each."""

    def __init__(self, core: ov.Core, model: ov.Model, settings: dict[str, Any]) -> None:
        super().__init__(core, model, settings)
        self._compiled: dict[int, list[ov.InferRequest]] = {}
        self._requests(1)  # a graph that cannot be compiled is refused when it is loaded

    def close(self) -> None:
        super().close()
        self._compiled.clear()

    def _requests(self, rows: int) -> list[ov.InferRequest]:
        if rows not in self._compiled:
            cores = self._settings["INFERENCE_NUM_THREADS"]
            streams = 1 if rows % cores else cores
            model = self._model.clone()
            model.reshape({port.any_name: _with_rows(port.partial_shape, rows // streams) for port in model.inputs})
            compiled = self._compile(model, streams)
            self._compiled[rows] = [compiled.create_infer_request() for _ in range(streams)]
        return self._compiled[rows]


def _with_rows(shape: ov.PartialShape, rows: int) -> list[int]:
    return [rows if size.is_dynamic else size.get_length() for size in shape]


def _wait(requests: list[ov.InferRequest]) -> list[RuntimeError]:
    """Wait for all of them, whatever becomes of each; gives what went wrong."""
    failed = []
    for request in requests:
        try:
            request.wait()
        except RuntimeError as error:
            failed.append(error)
    return failed
