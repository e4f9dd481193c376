from pathlib import Path

import numpy as np
import pytest

from evaluation import defences
from evaluation.attacks import predict
from handlers.pipeline import Pipeline
from tests import bundles
from tests.evaluation.models import of_bundle


@pytest.fixture(scope="module")
def pipeline(nvae_bundle: Path) -> Pipeline:
    return Pipeline.load(nvae_bundle, runtime="onnxruntime")


def test_wilson_interval() -> None:
    """Against the worked values of Newcombe, Statistics in Medicine 1998, table I."""
    assert defences.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert defences.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert defences.wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert defences.wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    assert defences.wilson(0, 0) == (0.0, 1.0)


def test_share_of_nothing_is_none() -> None:
    assert defences.share(np.zeros(0, np.bool_))["share"] is None
    assert defences.share(np.array([True, False, True, True]))["share"] == 0.75


def test_the_bare_classifier(pipeline: Pipeline, nvae_bundle: Path) -> None:
    images = bundles.images(70)
    reading = defences.bare(pipeline)(images)
    assert np.array_equal(reading.labels, predict(of_bundle(nvae_bundle), images))
    assert not reading.flagged.any()
    assert (reading.agreement == 1).all()


def test_the_purifier_reads_as_the_pipeline_does(pipeline: Pipeline) -> None:
    images = bundles.images(70)
    reading = defences.purifier(pipeline, samples=5, seed=9)(images)
    result = pipeline.run(images, samples=5, seeds=range(9, 79))
    assert np.array_equal(reading.labels, result.labels)
    assert np.array_equal(reading.sample_labels, result.sample_labels)
    assert np.array_equal(reading.flagged, result.flagged)
    assert reading.agreement == pytest.approx(result.agreement)
    assert 0 < reading.flagged.mean() < 1


def test_a_schedule_that_keeps_every_latent_gives_equal_samples(pipeline: Pipeline) -> None:
    reading = defences.purifier(pipeline, samples=3, alphas="none")(bundles.images(5))
    assert (reading.agreement == 1).all()


def test_simple_defences(pipeline: Pipeline) -> None:
    images = bundles.images(20)
    unchanged = defences.bare(pipeline)(images).labels
    quiet = defences.noise(pipeline, samples=3, l2=1e-6)(images)
    assert np.array_equal(quiet.labels, unchanged)
    loud = defences.noise(pipeline, samples=7, l2=20.0)(images)
    assert loud.sample_labels.shape == (20, 7)
    assert (loud.flagged == (loud.labels != unchanged)).all()
    assert loud.agreement.min() < 1
    blurred = defences.blur(pipeline)(images)
    assert (blurred.flagged == (blurred.labels != unchanged)).all()
    assert blurred.flagged.any()
    flat = np.full((2, 8, 8, 3), 90, np.uint8)
    assert not defences.blur(pipeline)(flat).flagged.any()
