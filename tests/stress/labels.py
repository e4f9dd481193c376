"""The same images and noise in every way to run a bundle: are the labels equal?

    python -m tests.stress.labels SIGNS.npz --count 1000      (needs build/road-signs, Java and Ray; some minutes)

Prints a table against `Pipeline` in ONNX Runtime; exit code 1 when a label differs. Image i has the seed i everywhere.
"""

import argparse
import base64
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from deploy import dev_server
from deploy.server import PORTS, free_ports
from deploy.torchserve import TorchServe
from export.archive import ArchiveSettings, build_archive
from export.single_graph import FOLDER, REPLAY, add_single_graph, replay
from handlers.manifest import Manifest
from handlers.pipeline import Pipeline
from tests.clusters import cluster, serving

_TOGETHER = 10  # images of a request, and of a call
Pixels = npt.NDArray[np.uint8]
Label = Callable[[int, Pixels], Sequence[int]]
"""Labels of images whose first has this seed."""


@contextlib.contextmanager
def pipeline(bundle: Path, samples: int, runtime: str) -> Iterator[Label]:
    with Pipeline.load(bundle, runtime, 1) as loaded:
        yield lambda first, some: loaded.run(some, samples, range(first, first + len(some))).labels.tolist()


@contextlib.contextmanager
def graph(bundle: Path, samples: int, runtime: str) -> Iterator[Label]:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "bundle"
        shutil.copytree(bundle, copy)
        manifest = add_single_graph(copy, samples)

        def label(first: int, some: Pixels) -> Sequence[int]:
            seeds = range(first, first + len(some))
            return replay(manifest, copy / FOLDER / REPLAY, some, samples, seeds, runtime)["label"].tolist()

        yield label


def asker(url: str, samples: int, headers: dict[str, str]) -> Label:
    def label(first: int, some: Pixels) -> Sequence[int]:
        images = []
        for image in some:
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "PNG")
            images.append(base64.b64encode(stream.getvalue()).decode())
        body = json.dumps({"images": images, "seed": first, "samples": samples}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", **headers})
        with urllib.request.urlopen(request, timeout=300) as response:
            return [answer["index"] for answer in json.loads(response.read())["answers"]]

    return label


@contextlib.contextmanager
def torchserve(bundle: Path, samples: int) -> Iterator[Label]:
    with tempfile.TemporaryDirectory(prefix="mlvgm-") as folder:
        archive = build_archive(
            bundle, Path(folder) / "store", ArchiveSettings("onnxruntime", threads=1, allow_seed=True)
        )
        server = TorchServe(free_ports(PORTS), folder)
        try:
            server.start([archive], 1)
            key = {"Authorization": f"Bearer {server.client().key('inference')}"}
            yield asker(f"{server.url}/predictions/{Manifest.read(bundle).name}", samples, key)
        finally:
            server.stop()


@contextlib.contextmanager
def development(bundle: Path, samples: int) -> Iterator[Label]:
    port = free_ports(1)
    served = (bundle, port, "onnxruntime", 1, None, 0.002, True)
    process = get_context("spawn").Process(target=dev_server.serve, args=served, daemon=True)
    process.start()
    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            time.sleep(0.2)
        yield asker(f"http://127.0.0.1:{port}/predictions/{Manifest.read(bundle).name}", samples, {})
    finally:
        process.terminate()
        process.join(30)


@contextlib.contextmanager
def ray_serve(bundle: Path, samples: int) -> Iterator[Label]:
    from deploy.ray.app import build

    port, name = free_ports(1), Manifest.read(bundle).name
    application = build({"bundle": str(bundle), "runtime": "onnxruntime", "allow_seed": True})
    with cluster(2), serving(application, name, port):
        yield asker(f"http://127.0.0.1:{port}/predictions/{name}", samples, {})


WAYS: dict[str, Callable[[Path, int], Any]] = {
    "Pipeline, ONNX Runtime": lambda bundle, samples: pipeline(bundle, samples, "onnxruntime"),
    "Pipeline, OpenVINO": lambda bundle, samples: pipeline(bundle, samples, "openvino"),
    "TorchServe": torchserve,
    "development server": development,
    "Ray Serve": ray_serve,
    "single graph, ONNX Runtime": lambda bundle, samples: graph(bundle, samples, "onnxruntime"),
    "single graph, OpenVINO": lambda bundle, samples: graph(bundle, samples, "openvino"),
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("signs", type=Path)
    parser.add_argument("--bundle", type=Path, default=Path("build/road-signs"))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args(words)
    images: Pixels = np.load(args.signs)["images"][: args.count]
    expected: list[int] = []
    different = 0
    print("| way | images | labels that differ | s |\n| --- | --- | --- | --- |", flush=True)
    for name, way in WAYS.items():
        began, found = time.monotonic(), list[int]()
        with way(args.bundle.resolve(), args.samples) as label:
            for first in range(0, len(images), _TOGETHER):
                found += label(first, images[first : first + _TOGETHER])
        expected = expected or found
        unlike = sum(one != other for one, other in zip(found, expected, strict=True))
        different += unlike
        print(f"| {name} | {len(found)} | {unlike} | {time.monotonic() - began:.0f} |", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
