"""What the device is, and what it can do at best: copies, products, and the filters that decide."""

import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, Case, Measured, compared
from benchmarks.gpu.models import laid_out
from export.families.stylegan2 import depthwise, shifted


def cases(bench: Bench) -> Iterator[Case]:
    """Of the group "ceilings"."""
    scale = 32 if bench.toy else 1  # of every size
    yield Case("device", lambda: {"facts": _device(bench)})
    yield Case("copy", partial(_copy, bench, 4 * 10**9 // scale**2, "device", "device"))
    yield Case("product fp16", partial(_product, bench, 8192 // scale))
    for size in (25 * 10**6, 4096):
        for way in ("host device", "pinned device", "device host", "device pinned"):
            yield Case(f"{size} bytes, {way}", partial(_copy, bench, size, *way.split()))
    for side, channels in ((1024, 32), (512, 64), (256, 128), (128, 256)):
        for words in ("nchw", "nhwc", "shifted nhwc", "shifted nhwc compiled"):
            run = partial(_filter, bench, side // scale, channels // scale, 4, words)
            yield Case(f"blur {side}x{channels} {words}", run, 8)
    for side, channels in ((8, 6144), (16, 3072), (32, 1536)):
        for words in ("nchw search", "nhwc search"):
            run = partial(_filter, bench, max(side // scale, 1), channels // scale, 5, words)
            yield Case(f"depthwise {side}x{channels} {words}", run, 8)


def _device(bench: Bench) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv"]
    seen = "" if bench.toy else subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    return {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "nvidia-smi": seen}


def _copy(bench: Bench, size: int, source: str, target: str) -> Measured:
    def made(place: str) -> Tensor:
        tensor = torch.randn(size // 4, device=bench.device if place == "device" else "cpu")
        return tensor.pin_memory() if place == "pinned" and not bench.toy else tensor

    here, there = made(source), made(target)
    row = bench.clock(lambda _: there.copy_(here, non_blocking=True))
    return row | {"gb_per_s": (2 if source == target else 1) * size / row["ms"] / 1e6}


def _product(bench: Bench, size: int) -> Measured:
    a, b = (torch.randn(size, size, device=bench.device).half() for _ in range(2))
    return (row := bench.clock(lambda _: a @ b)) | {"tflops": 2 * size**3 / row["ms"] / 1e9}


def _filter(bench: Bench, side: int, channels: int, taps: int, words: str) -> Measured:
    """A depthwise filter in half precision, against the same in fp32."""
    torch.backends.cudnn.benchmark = "search" in words
    line = torch.tensor([1.0, 3.0, 3.0, 1.0, 1.0][:taps], device=bench.device)
    kernel = (torch.outer(line, line) / line.sum() ** 2).expand(channels, 1, taps, taps).contiguous()
    function: Any = shifted(kernel) if "shifted" in words else depthwise
    if "compiled" in words:
        function = torch.compile(function, dynamic=False, fullgraph=True, backend="eager" if bench.toy else "inductor")
    x = torch.randn(8, channels, side + taps - 3, side + taps - 3, device=bench.device)  # a map of ``side`` comes out
    expected, given, halved = depthwise(x, kernel), laid_out(x.half(), words), kernel.half()
    row = bench.clock(lambda _: function(given, halved), 8)
    row |= compared([function(given, halved)], [expected], 5e-3)
    return row | {"gb_per_s": 2 * (x.numel() + expected.numel()) / row["ms"] / 1e6}
