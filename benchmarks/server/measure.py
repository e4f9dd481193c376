"""A bundle on TorchServe: throughput against the pipeline alone, latency against offered load, and stress tests."""

import asyncio
import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.server import load, servers
from benchmarks.server.background_load import BackgroundLoad
from benchmarks.server.calls import Call, Endpoint
from benchmarks.server.load import Say
from benchmarks.server.workload import BenchmarkSettings, Workload
from evaluation.progress import track

FRACTIONS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0)
HALF = 0.5
_QUEUED_BATCHES = 2  # wait at saturation while each worker answers one, so that the next is full
_FEWEST = 100  # requests: fewer say nothing about the slowest in a hundred
_ENOUGH, _LONGEST = 3000, 60.0  # requests that say it well, and seconds to wait for so many

IN_PROCESS, TORCHSERVE, DEV_SERVER = "in process", "TorchServe", "development server"

Stress = Callable[[Workload, servers.Deployment, float, Say], dict[str, Any]]
"""A stress test (tests/stress): gets the images a second that the deployment can answer, and returns its findings."""


def measure(settings: BenchmarkSettings, stress: Mapping[str, Stress], say: Say) -> dict[str, Any]:
    """Serve a bundle on free ports of loopback, measure it, and leave nothing behind.

    Returns:
        ``settings``, ``saturation``, and the findings of each stress test under its name.
    """
    with contextlib.ExitStack() as stack:
        say("loading the pipeline")
        workload = stack.enter_context(Workload(settings))
        workload.images_per_s(0)
        say("starting TorchServe")
        deployment = stack.enter_context(servers.torchserve(workload))
        endpoints = {TORCHSERVE: deployment.endpoint}
        if settings.dev_server:
            say("starting the development server")
            endpoints[DEV_SERVER] = stack.enter_context(servers.dev_server(workload))
        background = BackgroundLoad()
        found = _saturate(workload, endpoints, say)
        sustainable, alone = found["median"][TORCHSERVE], found["median"][IN_PROCESS]
        rows = _curve(workload, deployment.endpoint, sustainable, say)
        half = next(row for row in rows if row["fraction"] == HALF)
        content = {
            "settings": {
                "samples": settings.samples,
                "batch": settings.archive.batch_size,
                "runtime": workload.runtime,
                "precision": workload.manifest.precision,
                "threads": settings.threads,
                "workers": settings.workers,
                "batch_delay_ms": settings.archive.batch_delay_ms,
                "background_cores": background.cores(),
            },
            "saturation": {
                "server_images_per_s": sustainable,
                "in_process_images_per_s": alone,
                "ratio": sustainable / alone,
                "p50_ms": half["p50_ms"],
                "p99_ms": half["p99_ms"],
                **found,
                "open_load": rows,
            },
        }
        return content | {name: run(workload, deployment, sustainable, say) for name, run in stress.items()}


def _saturate(workload: Workload, endpoints: Mapping[str, Endpoint], say: Say) -> dict[str, Any]:
    """Images a second of the pipeline in process and of each server, in turns: what else the machine does hits all.

    Returns:
        ``clients`` of each server; ``rounds``, by name the images a second of each round; ``median``, the same in one
        figure; the numbers of `load.LoadResult.counts`; ``generator_cpu_us``, a request.
    """
    settings, batch = workload.settings, workload.settings.archive.batch_size
    slowest = batch / workload.images_per_s(0)  # of one batch, in seconds, before anything is warm
    seconds = max(settings.seconds, 6 * slowest)
    clients = batch * (settings.workers + _QUEUED_BATCHES)
    rounds: dict[str, list[float]] = {name: [] for name in (IN_PROCESS, *endpoints)}
    counts, cpu_seconds = collections.Counter[str](), 0.0
    for number in range(settings.rounds + 1):  # and one to warm up
        rates = {IN_PROCESS: workload.images_per_s(seconds)}
        for name, endpoint in endpoints.items():
            calls = _until(time.monotonic() + seconds, workload.calls())
            result = asyncio.run(load.closed_load(endpoint, calls, clients, 120 + 10 * slowest))
            rates[name] = result.per_second(batch)
            cpu_seconds += result.cpu_seconds
            counts.update(result.counts())
            result.show_failure(name, say)
        named = ", ".join(f"{name} {rate:.4g}" for name, rate in rates.items())
        say(f"saturation, {f'round {number} of {settings.rounds}' if number else 'warming up'}: {named} images/s")
        for name, rate in rates.items() if number else ():
            rounds[name].append(rate)
    return {
        "clients": clients,
        "rounds": rounds,
        "median": {name: statistics.median(values) for name, values in rounds.items()},
        **counts,
        "generator_cpu_us": cpu_seconds / max(counts["requests"], 1) * 1e6,
    }


def _curve(workload: Workload, endpoint: Endpoint, saturation: float, say: Say) -> list[dict[str, Any]]:
    """Latency against offered load, at `FRACTIONS` of ``saturation`` images a second, of requests that come at random.

    Returns:
        Rows with ``fraction``, ``offered_per_s``, ``achieved_per_s``, the numbers of `load.LoadResult.counts`,
        ``p50_ms``, ``p90_ms``, ``p99_ms``, and of the generator ``late_p99_ms`` and ``cpu_us``, a request.
    """
    rows = []
    for number, fraction in enumerate(FRACTIONS):
        offered, length = fraction * saturation, workload.settings.seconds
        if fraction == HALF:
            length = max(length, _FEWEST / offered, min(_ENOUGH / offered, _LONGEST))
        arrivals = track(load.poisson(offered, length, seed=number), f"open load, {fraction:.0%}", "request")
        result = asyncio.run(load.open_load(endpoint, workload.calls(), arrivals, 120 + 100 / saturation))
        answers, latencies = result.table(), result.latencies()
        row = {
            "fraction": fraction,
            "offered_per_s": offered,
            "achieved_per_s": len(latencies) / length,
            **result.counts(),
            **load.percentiles(latencies),
            "late_p99_ms": load.percentiles(answers["sent"] - answers["due"])["p99_ms"],
            "cpu_us": result.cpu_seconds / max(len(answers), 1) * 1e6,
        }
        rows.append(row)
        result.show_failure("open load", say)
        times = "no correct answer"
        if len(latencies):
            times = (
                f"{row['achieved_per_s']:.4g}/s answered, {row['p50_ms']:.0f} ms median, {row['p99_ms']:.0f} ms at 99 %"
            )
        say(f"open load, {fraction:.0%} of saturation: {offered:.4g}/s offered, {times}")
    return rows


def _until(moment: float, calls: Iterator[Call]) -> Iterator[Call]:
    while time.monotonic() < moment:
        yield next(calls)
