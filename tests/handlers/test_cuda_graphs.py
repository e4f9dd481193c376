"""How computations are recorded and replayed, with graphs on the CPU in the place of CUDA's."""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from handlers.runtimes import EngineError
from handlers.runtimes.cuda_graphs import Computation, CudaGraphs
from handlers.runtimes.device import DeviceArray
from handlers.runtimes.torch import Function, without_tf32
from tests.devices import Graph, record_on_cpu

CPU = torch.device("cpu")


def graphs(module: nn.Module, recorded: bool = True) -> CudaGraphs:
    function = Function(module.eval().requires_grad_(False), ["images"], ["codes"])
    return CudaGraphs(lambda inputs: Computation(partial(function, inputs), recorded), CPU)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5))


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    record_on_cpu(monkeypatch)


@pytest.mark.parametrize("recorded", [True, False])
def test_every_size_is_recorded_once_and_gives_what_the_module_gives(recorded: bool) -> None:
    module = network()
    engine = graphs(module, recorded)
    random = np.random.default_rng(0)
    for rows in (2, 3, 2, 1, 3, 2):
        images = random.random((rows, 3, 8, 8), np.float32)
        found = engine.run({"images": images})["codes"]
        assert np.array_equal(np.asarray(found), module(torch.from_numpy(images)).numpy())
    assert len(Graph.made) == (3 if recorded else 0)


def test_a_replay_leaves_earlier_outputs_alone() -> None:
    engine = graphs(network())
    first = engine.run({"images": np.zeros((2, 3, 8, 8), np.float32)})["codes"]
    kept = np.array(first)
    engine.run({"images": np.ones((2, 3, 8, 8), np.float32)})
    engine.run({"images": np.ones((4, 3, 8, 8), np.float32)})
    assert np.array_equal(np.asarray(first), kept)


def test_device_arrays_are_taken_and_cut_where_they_are() -> None:
    module = network()
    engine = graphs(module)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = DeviceArray(images)[np.array([3, 0, 3])]
    assert (rows.shape, len(rows)) == ((3, 3, 8, 8), 3)
    found = engine.run({"images": rows})["codes"]
    assert np.array_equal(np.asarray(found), module(images[[3, 0, 3]]).numpy())


def test_a_device_array_tells_which_rows_are_finite() -> None:
    numbers = torch.zeros(4, 2, 3)
    numbers[1, 0, 2], numbers[3, 1, 0] = torch.nan, torch.inf
    assert DeviceArray(numbers).finite().tolist() == [True, False, True, False]


def test_what_fails_is_an_engine_error_and_the_next_size_runs() -> None:
    engine = graphs(network())
    with pytest.raises(EngineError, match="PyTorch"):
        engine.run({"images": np.zeros((1, 3, 9, 8), np.float32)})
    assert len(engine.run({"images": np.zeros((1, 3, 8, 8), np.float32)})["codes"]) == 1


def test_a_recorded_computation_lives_until_the_engine_is_closed() -> None:
    made = []

    def prepare(inputs: dict) -> Computation:
        function = Function(network().eval().requires_grad_(False), ["images"], ["codes"])
        computation = Computation(partial(function, inputs))
        made.append(weakref.ref(computation))
        return computation

    engine = CudaGraphs(prepare, CPU)
    engine.run({"images": np.zeros((1, 3, 8, 8), np.float32)})
    gc.collect()
    assert made[0]() is not None
    engine.close()
    gc.collect()
    assert made[0]() is None


@pytest.mark.parametrize("error", [AssertionError, ValueError, TypeError, RuntimeError])
def test_whatever_a_program_raises_is_an_engine_error(error: type[Exception]) -> None:
    def prepare(_: dict) -> Computation:
        raise error("no such shape")

    with pytest.raises(EngineError, match="no such shape"):
        CudaGraphs(prepare, CPU).run({"images": np.zeros((1, 3, 8, 8), np.float32)})


def test_without_tf32_the_flag_can_still_be_read() -> None:
    without_tf32()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=False):
        pass
