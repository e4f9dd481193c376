"""Half of what a server can answer, for long: whether answers stay right, quick, and memory where it is."""

import asyncio
from typing import Any

import numpy as np

from benchmarks.server import load
from benchmarks.server.deployment import Deployment
from benchmarks.server.saturation import HALF, Say
from benchmarks.server.watch import Watch, growth
from benchmarks.server.workload import Workload

_PART = 60.0  # seconds; what became of single requests is forgotten after each part


def soak(workload: Workload, deployment: Deployment, sustainable: float, seconds: float, say: Say) -> dict[str, Any]:
    """Offer half of the ``sustainable`` images a second.

    Returns:
        ``seconds``, ``offered_per_s``, ``requests``, ``refused``, ``not_right`` of the others, ``worker_deaths``,
        ``memory_growth`` after the first tenth, ``memory`` as (seconds, bytes), and ``parts``, each with ``requests``
        and percentiles.
    """
    return asyncio.run(_run(workload, deployment, HALF * sustainable, seconds, say))


async def _run(workload: Workload, deployment: Deployment, offered: float, seconds: float, say: Say) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    refused, not_right, calls = 0, 0, workload.calls()
    lengths = np.diff(np.append(np.arange(0, seconds, _PART), seconds))
    async with Watch(deployment) as watch:
        for number, length in enumerate(lengths):
            arrivals = load.poisson(offered, float(length), seed=number)
            result = await load.open_load(deployment, calls, arrivals, 120 + 100 / offered)
            refused, not_right = refused + result.refused, not_right + result.failed
            parts.append({"requests": len(result), **load.percentiles(result.latencies)})
            said = f"{len(result)} requests; so far {refused} refused, {not_right} others not answered rightly"
            say(f"soak, part {number + 1} of {len(lengths)}: {said}")
            load.show_wrong("soak", result, say)
    begun = watch.memory[0][0]
    return {
        "seconds": seconds,
        "offered_per_s": offered,
        "requests": sum(part["requests"] for part in parts),
        "refused": refused,
        "not_right": not_right,
        "worker_deaths": watch.deaths,
        "memory_growth": growth(watch.memory, begun + seconds / 10),
        "memory": [(moment - begun, held) for moment, held in watch.memory],
        "parts": parts,
    }
