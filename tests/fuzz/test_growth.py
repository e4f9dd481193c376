"""What a request or an image costs grows with its bytes, and no faster."""

import contextlib
import gc
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handlers.image import ImageError, decode
from handlers.manifest import Manifest
from handlers.request import MAX_BODY, RequestError, parse
from tests.fuzz.growth import IMAGES, REQUESTS

SMALL, LARGE = 200_000, 800_000  # bytes, about
LITTLE = 0.005  # seconds: less is not compared


@pytest.fixture(scope="module")
def manifest(nvae_bundle: Path) -> Manifest:
    return Manifest.read(nvae_bundle)


@pytest.fixture(autouse=True)
def _nothing_else_is_counted() -> Iterator[None]:
    """Passes of the garbage collector visit all that this process holds, however little a request adds."""
    gc.freeze()
    yield
    gc.unfreeze()


def seconds(call: Callable[[], object], times: int = 3) -> float:
    """Of CPU, the least of a few calls."""
    best = float("inf")
    for _ in range(times):
        begun = time.process_time()
        call()
        best = min(best, time.process_time() - begun)
    return best


def check(make: Callable[[int], Callable[[], object]]) -> None:
    small, large = make(SMALL), make(LARGE)
    ratio = seconds(large) / max(seconds(small), LITTLE)
    assert ratio < 2.5 * LARGE / SMALL
    hashed = seconds(lambda: hashlib.sha256(bytes(MAX_BODY)).digest())
    assert seconds(make(MAX_BODY), 1) < 200 * hashed  # a second, of the two minutes that a response may take


def attempt(call: Callable[[], object]) -> None:
    with contextlib.suppress(RequestError, ImageError):
        call()


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(name: str, manifest: Manifest) -> None:
    def make(size: int) -> Callable[[], object]:
        body, headers = REQUESTS[name](size)

        def read() -> None:
            for image in parse({"body": body}, headers, manifest).images:
                decode(image, manifest.image_size)

        return lambda: attempt(read)

    check(make)


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    def make(size: int) -> Callable[[], object]:
        image = IMAGES[name](size)
        return lambda: attempt(lambda: decode(image, (8, 8)))

    check(make)
