"""A few steps in a process of its own, before anything is trained: some shapes end the process that tries them.

PyTorch 2.13's backward pass on a CPU crashes for some narrow shapes whose channels are last in memory.
"""

import multiprocessing
import resource
import time
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from mlvgm.training.nvae import begin, step
from mlvgm.training.settings import TrainingError, TrainingSettings

TIMEOUT = 900
STEPS = 3


@dataclass(frozen=True)
class StepCost:
    """What steps cost.

    Attributes:
        seconds: of the last one.
        memory: of the host, at most, in bytes.
        parameters: of the network.
        channels_last: whether PyTorch can train it in that order in memory.
    """

    seconds: float
    memory: int
    parameters: int
    channels_last: bool


def try_step(settings: TrainingSettings, device: str, threads: int = 0) -> StepCost:
    """Make a few steps on random images.

    Raises:
        TrainingError: the forward or the backward pass fails; says how.
    """
    shape = f"latents_per_scale {list(settings.shape.latents_per_scale)}, channels {settings.shape.channels}"
    for channels_last in (True, False):
        with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                return pool.submit(_measure, settings, device, threads, channels_last).result(TIMEOUT)
            except BrokenProcessPool:
                continue
            except futures.TimeoutError:
                for process in multiprocessing.active_children():
                    process.kill()
                raise TrainingError(f"{STEPS} steps took more than {TIMEOUT} s: choose a smaller size") from None
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise TrainingError(f"a step with this shape ({shape}) fails: {reason}") from None
    raise TrainingError(
        f"a step with this shape ({shape}) ended its process: it needs more memory than there is, or is a shape that "
        "this PyTorch cannot train; choose another"
    )


def _measure(settings: TrainingSettings, device: str, threads: int, channels_last: bool) -> StepCost:
    if threads:
        torch.set_num_threads(threads)
    state = begin(settings, torch.device(device), channels_last)
    images = torch.rand(settings.batch, 3, settings.image_size, settings.image_size, device=device)
    for _ in range(STEPS):
        started = time.monotonic()
        bound, _ = step(state, settings, images)
        finite = bool(torch.isfinite(bound.log_likelihood).all())
        seconds = time.monotonic() - started
    if not finite:
        raise ArithmeticError("the likelihood is not finite")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return StepCost(seconds, memory, sum(p.numel() for p in state.network.parameters()), channels_last)
