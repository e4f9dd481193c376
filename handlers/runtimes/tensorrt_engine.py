"""Run a TensorRT engine on tensors of PyTorch."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from handlers.runtimes import EngineError
from handlers.runtimes.cuda_graphs import Computation, CudaGraphs, Tensors


def engine_of(trt: ModuleType, runtime: Any, plan: Any, info: Mapping[str, Any], device: torch.device) -> CudaGraphs:
    """An engine that runs ``plan``, which needs ``runtime`` to stay alive; ``info`` is its JSON file."""
    names = _names(trt, plan, info)
    scratch = torch.empty(max(plan.device_memory_size_v2, 1), dtype=torch.uint8, device=device)

    def prepare(inputs: Tensors) -> Computation:
        # TensorRT-RTX records its own graphs, since it compiles kernels for new shapes while it runs.
        own_graphs = hasattr(trt, "CudaGraphStrategy")
        return Computation(Execution(trt, plan, names, inputs, scratch).start, not own_graphs)

    return CudaGraphs(prepare, device, owner=runtime)


def _names(trt: ModuleType, plan: Any, info: Mapping[str, Any]) -> dict[str, str]:
    """The stage's name of each tensor of ``plan``: Torch-TensorRT renames tensors, but keeps the order in ``info``."""
    tensors = [plan.get_tensor_name(i) for i in range(plan.num_io_tensors)]
    names = {tensor: tensor for tensor in tensors}
    for key, mode in (("inputs", trt.TensorIOMode.INPUT), ("outputs", trt.TensorIOMode.OUTPUT)):
        if key in info:
            of_mode = [tensor for tensor in tensors if plan.get_tensor_mode(tensor) == mode]
            names |= dict(zip(of_mode, info[key], strict=True))
    return names


class Execution:
    """An execution context on fixed tensors, for one batch size.

    All contexts share the memory ``scratch``, since only one runs at a time.
    """

    def __init__(
        self, trt: ModuleType, engine: Any, names: Mapping[str, str], inputs: Tensors, scratch: Tensor
    ) -> None:
        self._context = engine.create_execution_context(_settings(trt, engine))
        if self._context is None:
            raise EngineError("TensorRT cannot make an execution context: most likely too little GPU memory")
        self._context.set_device_memory(scratch.data_ptr(), scratch.numel())
        self._outputs: Tensors = {}
        for tensor in names:
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
                value = inputs[names[tensor]]
                if not self._context.set_input_shape(tensor, tuple(value.shape)):
                    raise EngineError(f"TensorRT: {tensor} cannot have the shape {tuple(value.shape)}")
                self._context.set_tensor_address(tensor, value.data_ptr())
        for tensor in names:  # the shapes of outputs are known only after those of all inputs
            if engine.get_tensor_mode(tensor) == trt.TensorIOMode.OUTPUT:
                value = torch.empty(tuple(self._context.get_tensor_shape(tensor)), device=scratch.device)
                self._context.set_tensor_address(tensor, value.data_ptr())
                self._outputs[names[tensor]] = value

    def start(self) -> Tensors:
        if not self._context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError("TensorRT: the engine could not be run")
        return self._outputs


def _settings(trt: ModuleType, engine: Any) -> Any:
    """Settings of a context that does not allocate its own memory."""
    ours = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(trt, "CudaGraphStrategy"):
        return ours
    settings = engine.create_runtime_config()
    settings.set_execution_context_allocation_strategy(ours)
    settings.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return settings
