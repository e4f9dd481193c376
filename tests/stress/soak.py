"""Half of what a server can answer, for long: whether answers stay correct and quick, and memory where it is."""

import asyncio
import collections
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.server import load
from benchmarks.server.load import Say
from benchmarks.server.measure import HALF
from benchmarks.server.servers import Deployment
from benchmarks.server.workload import Workload
from evaluation.progress import track
from evaluation.report import digits
from tests.stress.watch import Watch, in_words

_PART = 60.0  # seconds; single requests are forgotten after each part


def run(seconds: float, workload: Workload, deployment: Deployment, sustainable: float, say: Say) -> dict[str, Any]:
    """Offer half of the ``sustainable`` images a second.

    Returns:
        ``seconds``, ``offered_per_s``, the numbers of `load.LoadResult.counts`, the findings of a `Watch`, and
        ``parts``, each with ``requests`` and percentiles.
    """
    return asyncio.run(_soak(workload, deployment, HALF * sustainable, seconds, say))


def section(found: Mapping[str, Any]) -> str:
    """What `run` found, for the report."""
    ends = (found["parts"][0], found["parts"][-1])
    first, last = (f"{digits(part['p50_ms'])} and {digits(part['p99_ms'])} ms" for part in ends)
    return (
        f"## Soak\n\n{found['requests']} requests in {found['seconds']:g} s, {digits(found['offered_per_s'])} a "
        f"second: {found['refused']} refused, {found['failed']} others not answered correctly. "
        f"Median and 99 %: {first} in the first part, {last} in the last. {in_words(found)}."
    )


async def _soak(workload: Workload, deployment: Deployment, offered: float, seconds: float, say: Say) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    counts, calls = collections.Counter[str](), workload.calls()
    lengths = np.diff(np.append(np.arange(0, seconds, _PART), seconds))
    async with Watch(deployment) as watch:
        for number, length in enumerate(lengths):
            arrivals = track(load.poisson(offered, float(length), seed=number), "soak", "request")
            result = await load.open_load(deployment.endpoint, calls, arrivals, 120 + 100 / offered)
            counts.update(result.counts())
            parts.append({"requests": len(result.answers), **load.percentiles(result.latencies())})
            so_far = f"{counts['requests']} requests so far, {counts['refused']} refused, {counts['failed']} failed"
            say(f"soak, part {number + 1} of {len(lengths)}: {so_far}")
            result.show_failure("soak", say)
    return {"seconds": seconds, "offered_per_s": offered, **counts, "parts": parts, **watch.findings()}
