from pathlib import Path

import numpy as np
import pytest

from benchmarks import vote
from evaluation import report
from handlers.pipeline import Pipeline
from handlers.vote import rounds
from tests import bundles


def test_auto_is_compared_with_the_maximum(nvae_bundle: Path) -> None:
    images = bundles.images(21)
    with Pipeline.load(nvae_bundle, "onnxruntime", threads=1) as pipeline:
        most = pipeline.manifest.samples.max
        full = pipeline.run(images, most, range(7, 28))
        auto = pipeline.run(images, "auto", range(7, 28))
        found = vote.measure(pipeline, images, full.labels, batch=8, seed=7)
    assert found["equal"]["count"] == found["right_auto"]["count"] == (auto.labels == full.labels).sum()
    assert found["right_maximum"]["share"] == 1
    assert found["mean_samples"] == auto.samples.mean()
    assert sum(found["images_by_samples"].values()) == 21
    assert {int(count) for count in found["images_by_samples"]} <= set(rounds(most))
    assert found["speed_ratio"] == pytest.approx(found["images_per_s_auto"] / found["images_per_s_maximum"])
    content = {
        "bundle": "tiny 1.0", "images": 21, "batch": 8, "maximum": most, "runtime": "onnxruntime", "precision": "fp32",
        **report.measured_here(), "sets": {"clean": found},
    }  # fmt: skip
    row = vote.markdown(content).splitlines()[-1]
    assert row.startswith("| clean | ")
    assert f"| {np.round(auto.samples.mean(), 2):.2f} |" in row
