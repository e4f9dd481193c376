"""How many images a second a server answers, against the pipeline alone, and how long answers take below that."""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from benchmarks.server import load
from benchmarks.server.call import Target
from benchmarks.server.subject import Subject

FRACTIONS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0)
HALF = 0.5
_QUEUED_BATCHES = 2  # wait at saturation while each worker answers one, so that the next is full
_FEWEST = 100  # requests: fewer say nothing about the slowest in a hundred
_ENOUGH, _LONGEST = 3000, 60.0  # requests that say it well, and seconds to wait for so many
IN_PROCESS = "in process"

Say = Callable[[str], None]


class Entrant(NamedTuple):
    """A server to compare: its name, where it is, whether it wants JSON, and what must hold while it is asked."""

    name: str
    target: Target
    as_json: bool = False
    awake: Callable[[], AbstractContextManager[None]] = nullcontext


def saturate(
    subject: Subject, entrants: Sequence[Entrant], workers: int, seconds: float, rounds: int, say: Say
) -> dict[str, Any]:
    """Images a second of the pipeline in process and of each server, in turns: what else the machine does hits all.

    Returns:
        ``clients`` of each server; ``rounds``, by name the images a second of each round, the pipeline's under
        `IN_PROCESS`; ``median``, the same in one figure; requests ``refused``, and others ``not_right``;
        ``generator_cpu_us``, a request.
    """
    batch = subject.settings.batch
    slowest = batch / subject.images_per_s(0)  # of one batch, in seconds, before anything is warm
    seconds = max(seconds, 6 * slowest)
    clients = batch * (workers + _QUEUED_BATCHES)
    found: dict[str, list[float]] = {IN_PROCESS: [], **{entrant.name: [] for entrant in entrants}}
    spent, sent, refused, failed = 0.0, 0, 0, 0
    for number in range(rounds + 1):  # and one to warm up
        rates = {IN_PROCESS: subject.images_per_s(seconds)}
        for entrant in entrants:
            calls = subject.calls(as_json=entrant.as_json)
            calls = load.until(time.monotonic() + seconds, calls)
            with entrant.awake():
                outcomes = asyncio.run(load.closed(entrant.target, calls, clients, 120 + 10 * slowest))
            rates[entrant.name] = outcomes.per_second(batch)
            spent, sent = spent + outcomes.cpu_seconds, sent + len(outcomes)
            refused, failed = refused + outcomes.refused, failed + outcomes.failed
            load.show_wrong(entrant.name, outcomes, say)
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


def curve(subject: Subject, target: Target, saturation: float, seconds: float, say: Say) -> list[dict[str, Any]]:
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
        outcomes = asyncio.run(load.open_load(target, subject.calls(), arrivals, 120 + 100 / saturation))
        lateness = np.array(outcomes.sent) - np.array(outcomes.due)
        row = {
            "fraction": fraction,
            "offered_per_s": offered,
            "achieved_per_s": sum(outcomes.right) / length,
            "requests": len(outcomes),
            "refused": outcomes.refused,
            "not_right": outcomes.failed,
            **load.percentiles(outcomes.latencies),
            "late_p99_ms": float(np.percentile(lateness, 99)) * 1000 if len(lateness) else None,
            "cpu_us": outcomes.cpu_seconds / max(len(outcomes), 1) * 1e6,
        }
        rows.append(row)
        load.show_wrong("open load", outcomes, say)
        say(f"open load, {fraction:.0%} of saturation: {load.in_words(row)}")
    return rows
