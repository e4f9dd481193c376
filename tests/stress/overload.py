"""Twice as many requests as a server can answer: it must go on answering what it can, and refuse the rest at once."""

import asyncio
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.server import load
from benchmarks.server.calls import SILENT
from benchmarks.server.load import Say
from benchmarks.server.servers import Deployment
from benchmarks.server.workload import Workload
from evaluation.progress import track
from evaluation.report import digits

EXCESS = 2.0
SLOW = 1.0
"""Seconds that no refusal may take."""


def run(seconds: float, workload: Workload, deployment: Deployment, sustainable: float, say: Say) -> dict[str, Any]:
    """Offer `EXCESS` times the ``sustainable`` images a second, at random moments.

    Returns:
        ``offered_per_s``, ``goodput_per_s`` (correct answers within the time), ``goodput_ratio`` to the sustainable,
        ``refused``, ``slow`` refusals, ``refusal_p50_ms`` and so on, ``p50_ms`` and so on of correct answers,
        ``errors`` of other kinds and ``lost`` requests without any end.
    """
    offered = EXCESS * sustainable
    say(f"overload: {offered:.4g} requests a second for {seconds:g} s")
    arrivals = track(load.poisson(offered, seconds, seed=99), "overload", "request")
    result = asyncio.run(load.open_load(deployment.endpoint, workload.calls(), arrivals, 120 + 100 / sustainable))
    rows = result.table()
    done, due, correct, silent = rows["done"], rows["due"], rows["correct"], rows["status"] == SILENT
    refused = np.isin(rows["status"], load.REFUSALS)
    waits = (done - due)[refused]
    goodput = float((correct & (done <= due.min() + seconds)).sum()) / seconds
    return {
        "seconds": seconds,
        "requests": len(rows),
        "offered_per_s": offered,
        "sustainable_per_s": sustainable,
        "goodput_per_s": goodput,
        "goodput_ratio": goodput / sustainable,
        "refused": int(refused.sum()),
        "slow": int((waits > SLOW).sum()),
        **load.percentiles(waits, "refusal_"),
        **load.percentiles(result.latencies()),
        "errors": int((~correct & ~refused & ~silent).sum()),
        "lost": int(silent.sum()),
        "cpu_us": result.cpu_seconds / len(rows) * 1e6,
    }


def section(found: Mapping[str, Any]) -> str:
    """What `run` found, for the report."""
    return (
        f"## Overload\n\n{digits(found['offered_per_s'])} requests a second for {found['seconds']:g} s, where "
        f"{digits(found['sustainable_per_s'])} can be answered: {digits(found['goodput_per_s'])} a second were, "
        f"{found['goodput_ratio']:.0%}, half of them within {digits(found['p50_ms'])} ms and 99 % within "
        f"{digits(found['p99_ms'])} ms. {found['refused']} were refused, half of them within "
        f"{digits(found['refusal_p50_ms'])} ms, 99 % within {digits(found['refusal_p99_ms'])} ms, {found['slow']} "
        f"later than a second; {found['errors']} ended with another error, {found['lost']} hung."
    )
