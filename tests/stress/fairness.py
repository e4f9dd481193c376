"""One client sends only the dearest requests that are allowed, beside an ordinary one: how long does the latter wait?

    python -m tests.stress.fairness build/road-signs --connections 64

starts nginx and TorchServe with two clients, and prints how long the ordinary one, which asks for one image at a time,
waits for its answers: alone, then beside the other. The exit code is 1 when its slowest answer beside the other takes
more than `MOST` times its slowest one alone, or when either client gets no answer at all.
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.server.calls import Call, Connection, Endpoint
from benchmarks.server.load import closed_load
from export.archive import build_archive
from handlers.manifest import Manifest
from tests.deploy.pair import KEY, LONG_KEY, Pair, trusting
from tests.handlers.hostile import SIDE, encoded, wide_png

MOST = 5.0
_BETWEEN = 0.02  # seconds between two requests of the ordinary client


def ordinary(manifest: Manifest) -> Call:
    """A small image, with the model's own number of samples."""
    height, width = manifest.image_size
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    return Call(encoded(Image.fromarray(ramp), "PNG"))


def dearest(manifest: Manifest) -> list[Call]:
    """As many samples as are allowed, in one image and in sixteen; the largest images; an image that is in doubt."""
    most = manifest.samples.max
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    grain = encoded(Image.fromarray(noise), "PNG")
    texts = [base64.b64encode(grain).decode()] * 16
    many = [json.dumps({"images": texts, "samples": samples}).encode() for samples in (most // 4, "auto")]
    samples = f"X-Mlvgm-Samples: {most}\r\n".encode()
    return [
        *(Call(body, b"Content-Type: application/json\r\n") for body in many),
        Call(grain, samples),
        Call(grain),
        Call(wide_png(6, 16, 4), samples),
        Call(encoded(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)), "WEBP", quality=10), samples),
    ]


def endpoint(port: int, model: str, key: dict[str, str]) -> Endpoint:
    line = "".join(f"{name}: {value}\r\n" for name, value in key.items()).encode()
    return Endpoint(port, model, lambda: line, trusting())


def press(port: int, manifest: Manifest, connections: int, begun: Any, done: Any, statuses: Any) -> None:
    """Ask for all that is dear until ``done``; then put the number of answers by status into ``statuses``."""
    os.nice(10)  # what is measured is the server, which shares the machine with this process

    def calls() -> Iterator[Call]:
        for number, call in enumerate(itertools.cycle(dearest(manifest))):
            if number > connections:  # so one has been answered
                begun.set()
            if done.is_set():
                return
            yield call

    result = asyncio.run(closed_load(endpoint(port, manifest.name, LONG_KEY), calls(), connections))
    statuses.put(Counter(answer.status for answer in result.answers))


async def ask(port: int, manifest: Manifest, count: int) -> list[float]:
    """Seconds that each of the ordinary client's requests takes.

    Raises:
        AssertionError: one is not answered with 200.
    """
    connection, call, taken = Connection(endpoint(port, manifest.name, KEY), 120), ordinary(manifest), []
    for _ in range(count):
        begun = time.monotonic()
        reply = await connection.send(call)
        taken.append(time.monotonic() - begun)
        assert reply.status == 200, f"the ordinary client got {reply.status}"
        await asyncio.sleep(_BETWEEN)
    connection.close()
    return taken


def compare(port: int, manifest: Manifest, connections: int, count: int) -> bool:
    """Measure and print; whether all is as it should be."""
    asyncio.run(ask(port, manifest, 20))
    quiet = asyncio.run(ask(port, manifest, count))
    spawn = get_context("spawn")
    begun, done, statuses = spawn.Event(), spawn.Event(), spawn.Queue()
    other = spawn.Process(target=press, args=(port, manifest, connections, begun, done, statuses), daemon=True)
    other.start()
    assert begun.wait(60), "the other client gets no answer"
    beside = asyncio.run(ask(port, manifest, count))
    done.set()
    answered = statuses.get(timeout=1500)
    other.join()
    for words, taken in (("alone", quiet), ("beside the other", beside)):
        half, slow, worst = (1000 * np.quantile(taken, share) for share in (0.5, 0.99, 1))
        print(f"{words}: {half:.0f} ms in the middle, {slow:.0f} ms at 99 %, {worst:.0f} ms at most")
    ratio = max(beside) / max(quiet)
    print(f"the slowest took {ratio:.1f} times as long; the other client, {connections} at once: {dict(answered)}")
    return ratio <= MOST and answered[200] > 0


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.stress.fairness", description="A dear client beside an ordinary one.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--connections", type=int, default=8, help="of the other client (%(default)s)")
    parser.add_argument("--requests", type=int, default=200, help="of the ordinary client, each time (%(default)s)")
    parser.add_argument("--workers", type=int, default=3, help="of TorchServe (%(default)s)")
    options = parser.parse_args()
    manifest = Manifest.read(options.bundle)
    with tempfile.TemporaryDirectory(prefix="mlvgm-") as name:
        pair = Pair(Path(name))
        build_archive(options.bundle, pair.folder / "store")
        pair.start(pair.folder / "store", "--workers", str(options.workers), "--ready-timeout", "60")
        try:
            return 0 if compare(pair.port, manifest, options.connections, options.requests) else 1
        finally:
            pair.stop()


if __name__ == "__main__":
    sys.exit(main())
