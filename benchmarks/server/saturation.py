"""How many images a second a server answers, against the pipeline alone, and how long answers take below that."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.server import load
from benchmarks.server.call import Target
from benchmarks.server.workload import Workload

FRACTIONS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0)
HALF = 0.5
_QUEUED_BATCHES = 2  # wait at saturation while each worker answers one, so that the next is full
_FEWEST = 100  # requests: fewer say nothing about the slowest in a hundred
_ENOUGH, _LONGEST = 3000, 60.0  # requests that say it well, and seconds to wait for so many
IN_PROCESS = "in process"

Say = Callable[[str], None]


class ServerUnderTest(NamedTuple):
    """One of the servers that are compared."""

    name: str
    target: Target


def saturate(
    workload: Workload, servers: Sequence[ServerUnderTest], workers: int, seconds: float, rounds: int, say: Say
) -> dict[str, Any]:
    """Images a second of the pipeline in process and of each server, in turns: what else the machine does hits all.

    Returns:
        ``clients`` of each server; ``rounds``, by name the images a second of each round, the pipeline's under
        `IN_PROCESS`; ``median``, the same in one figure; requests ``refused``, and others ``not_right``;
        ``generator_cpu_us``, a request.
    """
    batch = workload.settings.batch
    slowest = batch / workload.images_per_s(0)  # of one batch, in seconds, before anything is warm
    seconds = max(seconds, 6 * slowest)
    clients = batch * (workers + _QUEUED_BATCHES)
    found: dict[str, list[float]] = {IN_PROCESS: [], **{server.name: [] for server in servers}}
    spent, sent, refused, failed = 0.0, 0, 0, 0
    for number in range(rounds + 1):  # and one to warm up
        rates = {IN_PROCESS: workload.images_per_s(seconds)}
        for server in servers:
            calls = load.until(time.monotonic() + seconds, workload.calls())
            result = asyncio.run(load.closed(server.target, calls, clients, 120 + 10 * slowest))
            rates[server.name] = result.per_second(batch)
            spent, sent = spent + result.cpu_seconds, sent + len(result)
            refused, failed = refused + result.refused, failed + result.failed
            load.show_wrong(server.name, result, say)
        named = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
        say(f"saturation, {f'round {number} of {rounds}' if number else 'warming up'}: {named} images/s")
        for name, rate in rates.items() if number else ():
            found[name].append(rate)
    return {
        "clients": clients,
        "rounds": found,
        "median": {name: statistics.median(values) for name, values in found.items()},
        "refused": refused,
        "not_right": failed,
        "generator_cpu_us": spent / max(sent, 1) * 1e6,
    }


def curve(workload: Workload, target: Target, saturation: float, seconds: float, say: Say) -> list[dict[str, Any]]:
    """Latency against offered load, at `FRACTIONS` of ``saturation`` images a second, of requests that come at random.

    Returns:
        Rows with ``fraction``, ``offered_per_s``, ``achieved_per_s``, ``requests``, ``refused``, ``not_right`` of the
        others, ``p50_ms``, ``p90_ms``, ``p99_ms``, and of the generator ``late_p99_ms`` and ``cpu_us``, a request.
    """
    rows = []
    for number, fraction in enumerate(FRACTIONS):
        offered = fraction * saturation
        length = max(seconds, _FEWEST / offered, min(_ENOUGH / offered, _LONGEST)) if fraction == HALF else seconds
        arrivals = load.poisson(offered, length, seed=number)
        result = asyncio.run(load.open_load(target, workload.calls(), arrivals, 120 + 100 / saturation))
        lateness = np.array(result.sent) - np.array(result.due)
        row = {
            "fraction": fraction,
            "offered_per_s": offered,
            "achieved_per_s": sum(result.right) / length,
            "requests": len(result),
            "refused": result.refused,
            "not_right": result.failed,
            **load.percentiles(result.latencies),
            "late_p99_ms": float(np.percentile(lateness, 99)) * 1000 if len(lateness) else None,
            "cpu_us": result.cpu_seconds / max(len(result), 1) * 1e6,
        }
        rows.append(row)
        load.show_wrong("open load", result, say)
        say(f"open load, {fraction:.0%} of saturation: {load.in_words(row)}")
    return rows
