"""A service on paper: a simulation of arrival and batching from measured times, and dollars for a million images.

    python -m benchmarks.queueing --cpu 0.10 --gpu 3.00

compares the simulation with the latencies that `mlvgm bench server` measured, and says what machines of the measured
rates cost at these dollars an hour, for two cores and for a GPU with its host. docs/scale.md has its output.
"""

import argparse
import heapq
import json
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_RESULTS = Path(__file__).parent / "results"
_FULL = 256  # samples of the requests in a full queue of road-signs: see Admission in docs/metrics.md


@dataclass(frozen=True)
class WorkerPool:
    """Workers that share cores, as TorchServe runs them.

    Attributes:
        seconds: of one core for a batch of so many images.
        delay_s: how long a worker waits for its batch to fill.
        queue: requests that wait at most; the next one is refused.
    """

    seconds: Callable[[int], float]
    workers: int
    cores: int
    batch: int
    delay_s: float
    queue: int


def simulate(server: WorkerPool, per_s: float, requests: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], int]:
    """Seconds to each answer, and the number of refusals, of requests that come at random, ``per_s`` a second.

    While more workers compute than there are cores, all slow down alike.
    """
    arrivals = deque(np.random.default_rng(seed).exponential(1 / per_s, requests).cumsum().tolist())
    waiting: deque[float] = deque()
    filling: list[tuple[float, int]] = []  # when a worker stops waiting for its batch to fill
    computing: list[list[Any]] = []  # seconds of a core that are left, arrivals of the batch
    now, free, refused, latencies = 0.0, server.workers, 0, list[float]()
    while arrivals or waiting or computing:
        while free > len(filling) and len(waiting) > server.batch * len(filling):
            heapq.heappush(filling, (now + server.delay_s, len(filling)))
        while filling and (filling[0][0] <= now or len(waiting) >= server.batch):
            heapq.heappop(filling)
            batch = [waiting.popleft() for _ in range(min(server.batch, len(waiting)))]
            if batch:
                computing.append([server.seconds(len(batch)), batch])
                free -= 1
        speed = min(1.0, server.cores / len(computing)) if computing else 1.0
        ends = now + min((left for left, _ in computing), default=np.inf) / speed
        then = min(ends, arrivals[0] if arrivals else np.inf, filling[0][0] if filling else np.inf)
        for each in computing:
            each[0] -= (then - now) * speed
        now = then
        for each in [each for each in computing if each[0] <= 1e-9]:
            computing.remove(each)
            latencies += [now - came for came in each[1]]
            free += 1
        while arrivals and arrivals[0] <= now:
            came = arrivals.popleft()
            if len(waiting) < server.queue:
                waiting.append(came)
            else:
                refused += 1
    return np.array(latencies), refused


def measured(server: dict[str, Any], stages: dict[str, Any]) -> WorkerPool:
    """The server of a report of `mlvgm bench server`, from its rate in process and the stages' times for a batch.

    A batch of n images takes a + b n: two batch sizes of stages.json give a : b, and the rate in process their sum.
    """
    of, cores = server["settings"], server["machine"]["cores"]
    wanted = (server["bundle"].split()[0], "exported", of["runtime"], of["precision"], of["samples"])
    names = ("recipe", "technique", "runtime", "precision", "samples")
    times = {
        row["batch"]: row["batch"] / row["images_per_s"]
        for row in stages["rows"]
        if tuple(row[name] for name in names) == wanted
    }
    (few, fast), (many, slow) = sorted(times.items())
    each = (slow - fast) / (many - few)
    alone = fast - each * few
    scale = cores * of["batch"] / server["saturation"]["in_process_images_per_s"] / (alone + each * of["batch"])
    delay_s = of["batch_delay_ms"] / 1000
    return WorkerPool(
        lambda n: scale * (alone + each * n), of["workers"], cores, of["batch"], delay_s, _FULL // of["samples"]
    )


def compared(server: dict[str, Any], stages: dict[str, Any]) -> list[tuple[float, ...]]:
    """For each load: its share of saturation, the measured median and 99 % in ms, and those of the simulation."""
    model = measured(server, stages)
    rows: list[tuple[float, ...]] = []
    for load in server["saturation"]["open_load"]:
        came = load["achieved_per_s"] * load["requests"] / (load["requests"] - load["refused"])
        seconds, _ = simulate(model, came, 50_000)
        middle, most = np.percentile(seconds, (50, 99)) * 1000
        rows.append((load["fraction"], load["p50_ms"], load["p99_ms"], float(middle), float(most)))
    return rows


def per_million(price: float, images_per_s: float) -> float:
    """Dollars for a million images on machines that are busy all the time, at ``price`` dollars an hour each."""
    return price / 3600 / images_per_s * 1e6


def rates() -> Iterator[tuple[str, str, float]]:
    """What was measured: in words, on "cpu" (two cores) or "gpu", and images a second."""
    server, stages, gpu = map(_read, ("server-road-signs", "stages", "gpu"))
    yield "road-signs, 8 samples, fp32, served", "cpu", server["saturation"]["server_images_per_s"]
    for recipe, batch, samples in (("road-signs", 4, 8), ("road-signs", 4, 32), ("stanford-cars", 1, 1)):
        (row,) = (
            row
            for row in stages["rows"]
            if (row["recipe"], row["batch"], row["samples"]) == (recipe, batch, samples)
            and (row["runtime"], row["precision"]) == ("openvino", "bf16")
        )
        yield (
            f"{recipe}, {samples} {'sample' if samples == 1 else 'samples'}, bf16, in process",
            "cpu",
            row["images_per_s"],
        )
    for group, case, images, what in (
        ("road-signs", "fp16 answers", 64, "road-signs, 8 samples, fp16, 64 images at once"),
        ("e4e product", "answers by 32", 1, "an e4e of the published size, 32 samples, fp16, one image at once"),
    ):
        found = [row for row in gpu["rows"] if (row["group"], row["case"], row["rows"]) == (group, case, images)]
        devices = " and ".join(sorted({row["device"] for row in found}))
        yield f"{what}, {devices}", "gpu", statistics.median(row["per_s"] for row in found)


def main(words: Sequence[str] | None = None) -> None:
    """Print both tables, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", type=float, required=True, help="dollars an hour for two cores")
    parser.add_argument("--gpu", type=float, required=True, help="dollars an hour for a GPU with its host")
    prices = vars(parser.parse_args(words))
    print("| load | median measured, ms | simulated | 99 % measured, ms | simulated |\n| --- | --- | --- | --- | --- |")
    for load, middle, most, middle_here, most_here in compared(_read("server-road-signs"), _read("stages")):
        print(f"| {load:.0%} | {middle:.0f} | {middle_here:.0f} | {most:.0f} | {most_here:.0f} |")
    print("\n| | images/s: 1 machine | 10 | 1,000 | $ a million |\n| --- | --- | --- | --- | --- |")
    for what, kind, rate in rates():
        on = " | ".join(_rounded(rate * machines) for machines in (1, 10, 1000))
        print(f"| {what} ({kind}) | {on} | {per_million(prices[kind], rate):,.2f} |")


def _rounded(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.3g}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"


def _read(name: str) -> dict[str, Any]:
    return json.loads((_RESULTS / f"{name}.json").read_text())


if __name__ == "__main__":
    main()
