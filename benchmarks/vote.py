"""What ``samples="auto"`` costs and brings, against the maximum of samples on the same images and noise."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from evaluation import report
from evaluation.progress import track
from evaluation.shares import percent, share
from handlers.arrays import IntArray, Pixels
from handlers.pipeline import Pipeline


def measure(pipeline: Pipeline, images: Pixels, labels: IntArray, batch: int, seed: int = 0) -> dict[str, Any]:
    """Run batch after batch both ways, in turn, so that whatever slows the machine down slows both.

    Args:
        images: (N, H, W, 3).
        labels: (N,), the correct classes.
        batch: images a call.
        seed: of the first image; each further one has the next.
    """
    most = pipeline.manifest.samples.max
    found: dict[str | int, list[IntArray]] = {"auto": [], most: []}
    seconds: dict[str | int, float] = dict.fromkeys(found, 0.0)
    drawn = []
    for start in track(range(0, len(images), batch), "voting", f"x{batch} image"):
        some = images[start : start + batch]
        for samples in found:
            began = time.perf_counter()
            result = pipeline.run(some, samples, range(seed + start, seed + start + len(some)))
            found[samples].append(result.labels)
            seconds[samples] += time.perf_counter() - began
            if samples == "auto":
                drawn.append(result.samples)
    auto, full = (np.concatenate(parts) for parts in found.values())
    counts = np.concatenate(drawn)
    return {
        "equal": share(auto == full),
        "right_auto": share(auto == labels),
        "right_maximum": share(full == labels),
        "mean_samples": float(counts.mean()),
        "images_by_samples": {str(count): int((counts == count).sum()) for count in np.unique(counts)},
        "images_per_s_auto": len(images) / seconds["auto"],
        "images_per_s_maximum": len(images) / seconds[most],
        "speed_ratio": seconds[most] / seconds["auto"],
    }


def markdown(content: Mapping[str, Any]) -> str:
    """The page of a report."""
    rows = [
        {
            "images": name,
            "equal labels": percent(found["equal"]),
            "accuracy: auto": percent(found["right_auto"]),
            "accuracy: maximum": percent(found["right_maximum"]),
            "mean samples": f"{found['mean_samples']:.2f}",
            "images/s": f"{found['images_per_s_auto']:.1f}",
            "speedup of auto": f"{found['speed_ratio']:.2f}",
        }
        for name, found in content["sets"].items()
    ]
    conditions = (
        f"`{content['bundle']}`, {content['images']} validation images, {content['batch']} a call, `auto` against "
        f"{content['maximum']} samples; {content['runtime']}, {content['precision']}; {report.conditions(content)}"
    )
    return "\n".join([conditions, "", *report.table(list(rows[0]), [list(row.values()) for row in rows])]) + "\n"
