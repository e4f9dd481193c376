"""A Ray cluster of two nodes on this machine, of which one is killed: within requests, and within a bulk job.

    python -m tests.stress.nodes SIGNS.npz      (needs build/road-signs; some minutes; 1,000 requests, 5,000 images)

Every request and image is answered or reported, none twice, and every answer is the one that the pipeline gives here.
Prints a line of JSON for each part; exit code 1 when something was lost, doubled or wrong.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from handlers.pipeline import Pipeline
from handlers.service import Service
from handlers.settings import HandlerSettings
from mlvgm.cli.bulk import Bulk
from mlvgm.cli.cluster import workers
from mlvgm.cli.purify import FilePurifier
from tests.clusters import cluster, serving
from tests.machine import free_port

SAMPLES = 1


def kill_one(nodes: Any) -> None:
    """Without a farewell, as when its machine fails."""
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)


def ask(url: str, image: bytes, seed: int) -> tuple[int, Any]:
    """Status and JSON; 0 where there was no answer, with the reason."""
    headers = {"X-Mlvgm-Seed": str(seed), "X-Mlvgm-Samples": str(SAMPLES)}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, image, headers), timeout=300) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def storm(bundle: Path, url: str, images: Sequence[bytes], nodes: Any, kill_after: int) -> dict[str, Any]:
    """Ask ``url`` for ``images``, eight at a time, and kill a node after some answers."""
    answered, killed = threading.Semaphore(0), threading.Event()

    def one(i: int) -> tuple[int, Any]:
        got = ask(url, images[i], i)
        answered.release()
        return got

    def kill() -> None:
        for _ in range(kill_after):
            answered.acquire()
        kill_one(nodes)
        killed.set()

    threading.Thread(target=kill, daemon=True).start()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(one, range(len(images))))
    assert killed.wait(300)
    wrong = 0
    with Pipeline.load(bundle, "onnxruntime", 1) as pipeline:
        service = Service(pipeline, HandlerSettings(allow_seed=True))
        for i, (status, answer) in enumerate(got):
            options = {"X-Mlvgm-Seed": str(i), "X-Mlvgm-Samples": str(SAMPLES)}
            (here,) = service.answer([({"body": images[i]}, options)])
            wrong += status == 200 and answer["label"] != json.loads(here.body)["label"]
    statuses = Counter(status for status, _ in got)
    reasons = Counter(str(answer)[:80] for status, answer in got if status != 200)
    return {"requests": len(images), "statuses": dict(statuses), "wrong": wrong, "reasons": dict(reasons)}


def requests(bundle: Path, name: str, images: Sequence[bytes], kill_after: int) -> dict[str, Any]:
    """A `storm` on two replicas of a cluster of two nodes."""
    from deploy.ray.app import Purifier as Replica

    port = free_port()
    application = Replica.options(num_replicas=2).bind(str(bundle), "onnxruntime", allow_seed=True)
    with cluster(1, 1) as nodes, serving(application, name, port):
        return storm(bundle, f"http://127.0.0.1:{port}/predictions/{name}", images, nodes, kill_after)


def job(bundle: Path, folder: Path, scratch: Path, nodes: Sequence[int], kill_after: int | None) -> dict[str, Any]:
    """A job on a cluster with so many cores in each node; one is killed after some rows."""
    make = {"bundle": bundle.resolve(), "runtime": "onnxruntime", "threads": 1, "seed": 3, "samples": SAMPLES}
    out = scratch / f"out{len(nodes)}{kill_after}"
    with cluster(*nodes) as made, FilePurifier(**make) as purifier:
        began, files = time.monotonic(), Counter[str]()
        with workers(made.address, 1, make, purifier.settings) as (submit, ahead):
            bulk = Bulk([folder], out, "purified", purifier.settings, purifier.batch)
            for row in bulk.run_ahead(submit, ahead):
                files[row["file"] if "error" not in row else f"error: {row['error']}"] += 1
                if sum(files.values()) == kill_after:
                    kill_one(made)
        seconds = time.monotonic() - began
    here = scratch / "here"
    with FilePurifier(**make) as purifier:
        for _ in Bulk([folder], here, "purified", purifier.settings, purifier.batch).run(purifier.purify):
            pass
    names = [path.name for path in sorted(folder.iterdir())]
    return {
        "images": len(names),
        "workers": sum(nodes),
        "killed_after": kill_after,
        "lost": sum(files[str(folder / name)] == 0 for name in names),
        "twice": sum(files[str(folder / name)] > 1 for name in names),
        "reported": sum(count for file, count in files.items() if file.startswith("error")),
        "other_bytes": sum(not same(out / name, here / name) for name in names),
        "seconds": round(seconds, 1),
    }


def same(one: Path, other: Path) -> bool:
    return one.exists() and one.read_bytes() == other.read_bytes()


def scheduling(nodes: Sequence[int], batches: int = 200, seconds: float = 0.05) -> float:
    """Seconds for batches that take ``seconds`` of waiting each, on workers that are there already.

    No product figure: it says what sharing out the work costs, on a machine whose cores are not what bounds it.
    """

    def wait(_make: Any, _settings: Any, images: Sequence[bytes]) -> list[str]:
        time.sleep(seconds)
        return ["done"] * len(images)

    with contextlib.ExitStack() as stack:
        made = stack.enter_context(cluster(*nodes))
        stack.enter_context(patch("mlvgm.cli.cluster._purify", wait))
        submit, ahead = stack.enter_context(workers(made.address, 1, {}, {}))
        for promise in [submit([b""]) for _ in range(4 * ahead)]:
            promise()
        began, under_way = time.monotonic(), []
        for _ in range(batches):
            under_way.append(submit([b"x" * 3000] * 32))
            if len(under_way) == ahead:
                under_way.pop(0)()
        for promise in under_way:
            promise()
        return time.monotonic() - began


def writing(folder: Path, out: Path) -> float:
    """Images a second that a job reads, hands out, takes back and writes when workers take no time."""
    png = next(folder.iterdir()).read_bytes()

    def nothing(_make: Any, _settings: Any, images: Sequence[bytes]) -> list[tuple[bytes, dict[str, Any]]]:
        return [(png, {"label": "a sign", "agreement": 1.0})] * len(images)

    with contextlib.ExitStack() as stack:
        made = stack.enter_context(cluster(1))
        stack.enter_context(patch("mlvgm.cli.cluster._purify", nothing))
        submit, ahead = stack.enter_context(workers(made.address, 1, {}, {}))
        submit([b""])()
        began = time.monotonic()
        rows = sum(1 for _ in Bulk([folder], out, "purified", {}, 32).run_ahead(submit, ahead))
        return rows / (time.monotonic() - began)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("signs", type=Path)
    parser.add_argument("--bundle", type=Path, default=Path("build/road-signs"))
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--parts", nargs="+", default=["requests", "job", "four", "scheduling", "writing"])
    args = parser.parse_args(words)
    pixels = np.load(args.signs)["images"][: max(args.requests, args.images)]
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "in"
        folder.mkdir()
        encoded = []
        for i, image in enumerate(pixels):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG")
            encoded.append(stream.getvalue())
            if i < args.images:
                (folder / f"{i:05d}.png").write_bytes(encoded[-1])
        name = json.loads((args.bundle / "pipeline.json").read_text())["name"]
        for part in args.parts:
            if part == "requests":
                said = requests(args.bundle.resolve(), name, encoded[: args.requests], args.requests // 3)
                failed += said["wrong"] + (sum(said["statuses"].values()) != args.requests)
            elif part == "writing":
                said = {"images_per_s": round(writing(folder, Path(scratch) / "written"))}
            elif part == "scheduling":
                one, two = scheduling([1]), scheduling([1, 1])
                said = {"one_worker_s": round(one, 2), "two_workers_s": round(two, 2), "ratio": round(one / two, 2)}
                failed += one / two < 1.8
            else:
                on = ([1, 1], args.images // 3) if part == "job" else ([1, 1, 1, 1], None)
                said = job(args.bundle, folder, Path(scratch), *on)
                failed += said["lost"] + said["twice"] + said["other_bytes"] + said["reported"]
            print(json.dumps({part: said}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
