"""Twice as many requests as a server can answer: it must go on answering what it can, and refuse the rest at once."""

import asyncio
from typing import Any

import numpy as np

from benchmarks.server import load
from benchmarks.server.connection import SILENT
from benchmarks.server.deployment import Deployment
from benchmarks.server.workload import Workload

EXCESS = 2.0
SLOW = 1.0
"""Seconds that no refusal may take."""


def overload(workload: Workload, deployment: Deployment, sustainable: float, seconds: float) -> dict[str, Any]:
    """Offer `EXCESS` times the ``sustainable`` images a second, at random moments.

    Returns:
        ``offered_per_s``, ``goodput_per_s`` (right answers within the time), ``goodput_ratio`` to the sustainable,
        ``refused``, ``slow`` refusals, ``refusal_p50_ms`` and so on, ``p50_ms`` and so on of right answers, ``errors``
        of other kinds and ``lost`` requests without any end.
    """
    offered = EXCESS * sustainable
    arrivals = load.poisson(offered, seconds, seed=99)
    result = asyncio.run(load.open_load(deployment, workload.calls(), arrivals, 120 + 100 / sustainable))
    done, due, status = (np.array(column) for column in (result.done, result.due, result.status))
    right = np.array(result.right, bool)
    refused = np.isin(status, load.REFUSALS)
    waits = (done - due)[refused]
    goodput = float((right & (done <= due.min() + seconds)).sum()) / seconds
    return {
        "seconds": seconds,
        "requests": len(result),
        "offered_per_s": offered,
        "sustainable_per_s": sustainable,
        "goodput_per_s": goodput,
        "goodput_ratio": goodput / sustainable,
        "refused": int(refused.sum()),
        "slow": int((waits > SLOW).sum()),
        **load.percentiles(waits, "refusal_"),
        **load.percentiles(result.latencies),
        "errors": int((~right & ~refused & (status != SILENT)).sum()),
        "lost": int((status == SILENT).sum()),
        "cpu_us": result.cpu_seconds / len(result) * 1e6,
    }
