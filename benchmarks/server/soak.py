"""Half of what a server can answer, for long: whether answers stay right, quick, and memory where it is."""

import asyncio
from typing import Any

import numpy as np

from benchmarks.server import load
from benchmarks.server.deployment import Deployment
from benchmarks.server.saturation import HALF, Say
from benchmarks.server.subject import Subject
from benchmarks.server.watch import Watch, growth

_PART = 60.0  # seconds; what became of single requests is forgotten after each part


def soak(subject: Subject, deployment: Deployment, sustainable: float, seconds: float, say: Say) -> dict[str, Any]:
    """Offer half of the ``sustainable`` images a second.

    Returns:
        ``seconds``, ``offered_per_s``, ``requests``, ``refused``, ``not_right`` of the others, ``worker_deaths``,
        ``memory_growth`` after the first tenth, ``memory`` as (seconds, bytes), and ``parts``, each with ``requests``
        and percentiles.
    """
    return asyncio.run(_run(subject, deployment, HALF * sustainable, seconds, say))


async def _run(subject: Subject, deployment: Deployment, offered: float, seconds: float, say: Say) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    refused, not_right, calls = 0, 0, subject.calls()
    lengths = np.diff(np.append(np.arange(0, seconds, _PART), seconds))
    async with Watch(deployment) as watch:
        for number, length in enumerate(lengths):
            arrivals = load.poisson(offered, float(length), seed=number)
            outcomes = await load.open_load(deployment, calls, arrivals, 120 + 100 / offered)
            refused, not_right = refused + outcomes.refused, not_right + outcomes.failed
            parts.append({"requests": len(outcomes), **load.percentiles(outcomes.latencies)})
            said = f"{len(outcomes)} requests; so far {refused} refused, {not_right} others not answered rightly"
            say(f"soak, part {number + 1} of {len(lengths)}: {said}")
            load.show_wrong("soak", outcomes, say)
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
