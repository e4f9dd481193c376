"""How cases are timed, profiled and compared, on a GPU or, for a rehearsal, on a CPU."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Measured = dict[str, Any]
"""Some of `benchmarks.gpu.__main__.FIELDS`."""

_REPEATS, _WARM_UPS, _SECONDS, _TOP = 50, 3, 1.5, 15


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: what is measured, in the words of `benchmarks.gpu.cases`.
        run: measures it.
        rows: images in one call.
        predicted_ms: of one call on an H100, as estimated before any run.
    """

    name: str
    run: Callable[[], Measured]
    rows: int = 0
    predicted_ms: float | None = None


@dataclass(frozen=True)
class Bench:
    """Where cases run.

    Attributes:
        toy: on the CPU, tiny models and a few calls, whose figures mean nothing.
        work: folder for bundles.
    """

    toy: bool
    work: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.toy else torch.device("cuda", 0)

    @property
    def device_name(self) -> str:
        return "cpu" if self.toy else torch.cuda.get_device_name(self.device)

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if not self.toy:
            torch.cuda.synchronize(self.device)

    def clock(self, call: Callable[[int], Any], rows: int = 0) -> Measured:
        """Times of ``call(i)``, which takes its i-th inputs: those of one call should not lie in a cache for the next.

        The first call, with all that is compiled or recorded in it, is ``setup_s``.
        """
        begun = time.perf_counter()
        call(0)
        self.wait()
        setup, times = time.perf_counter() - begun, list[float]()
        begun = time.perf_counter()
        for i in range(2 if self.toy else _REPEATS + _WARM_UPS):
            times.append(self._milliseconds(call, i + 1))
            if i > 2 * _WARM_UPS and time.perf_counter() - begun > _SECONDS:
                break
        times = sorted(times if self.toy else times[_WARM_UPS:])
        median = statistics.median(times)
        return {
            "ms": median,
            "ms_p90": times[int(0.9 * (len(times) - 1))],
            "repeats": len(times),
            "per_s": 1000 * rows / median if rows else None,
            "setup_s": setup,
            "allocated_gb": None if self.toy else torch.cuda.max_memory_allocated(self.device) / 1e9,
        }

    def _milliseconds(self, call: Callable[[int], Any], i: int) -> float:
        """On a GPU, told by its own clock."""
        if self.toy:
            begun = time.perf_counter()
            call(i)
            return (time.perf_counter() - begun) * 1000
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(i)
        end.record()
        self.wait()
        return start.elapsed_time(end)

    def profile(self, call: Callable[[int], Any]) -> tuple[Measured, float]:
        """How many kernels one call starts and which cost most; and the milliseconds that all of them take."""
        kind = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kind.CPU if self.toy else kind.CUDA]) as profiler:
            call(1)
            self.wait()
        key = "self_cpu_time_total" if self.toy else "self_device_time_total"
        found = sorted(((e.key, e.count, getattr(e, key)) for e in profiler.key_averages()), key=lambda e: -e[2])
        top = [list(entry) for entry in found[:_TOP]]
        return {"kernels": sum(entry[1] for entry in found), "top": top}, sum(entry[2] for entry in found) / 1000


def compared(found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> Measured:
    """The largest relative L2 error of the outputs, computed where they are.

    Raises:
        ValueError: it is over ``limit``, or not a number.
    """
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        raise ValueError(f"shapes {[tuple(t.shape) for t in found]}, not {[tuple(t.shape) for t in expected]}")
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    if worst > limit:
        raise ValueError(f"relative error {worst:.2g}, over {limit:.0e}")
    return {"relative_error": worst, "limit": limit}
