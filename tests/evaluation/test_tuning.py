from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("optuna")

from evaluation.tuning import Sets, Trial, Weights, gain, objective, ranked, schedules, search
from handlers.pipeline import Pipeline
from tests import bundles

TARGET = (0.2, 0.9, 0.0, 0.55)


def near_target(weights: Weights, origin: str) -> Trial:
    distance = float(np.abs(np.array(weights) - TARGET).mean())
    return Trial(weights, origin, clean=1 - distance, attacked=1 - distance)


def test_finds_weights_that_no_schedule_has() -> None:
    trials = search(near_target, 4, trials=30)
    best_schedule = max(near_target(weights, name).score for name, weights in schedules(4))
    assert best_schedule < 0.85
    assert trials[0].score > 0.95
    assert trials == ranked(trials)


def test_keeps_to_the_number_of_trials_and_never_repeats_one() -> None:
    asked: list[Weights] = []

    def score(weights: Weights, origin: str) -> Trial:
        asked.append(weights)
        return near_target(weights, origin)

    told: list[Trial] = []
    for limit in (3, 19, 22):
        asked.clear()
        told.clear()
        assert len(search(score, 4, limit, told.append)) == len(asked) == len(set(asked)) == len(told) == limit


def test_weights_stay_in_range() -> None:
    def towards_one(weights: Weights, origin: str) -> Trial:
        return Trial(weights, origin, sum(weights), sum(weights))

    for trial in search(towards_one, 3, trials=21):
        assert all(0 <= weight <= 1 for weight in trial.weights)


def test_the_score_is_the_mean_of_clean_and_attacked(nvae_bundle: Path) -> None:
    images, other = bundles.images(6), bundles.images(6, seed=1)
    with Pipeline.load(nvae_bundle, runtime="onnxruntime") as pipeline:
        weights = (0.0, 0.0)
        labels = pipeline.run(images, samples=1, seeds=range(6), alphas=list(weights)).labels
        wrong = pipeline.run(other, samples=1, seeds=range(6), alphas=list(weights)).labels
        trial = objective(pipeline, Sets(images, {"a": images, "b": other}, labels), samples=2)(weights, "none")
    assert trial.clean == 1.0
    assert trial.attacked == pytest.approx((1.0 + (wrong == labels).mean()) / 2)
    assert trial.score == (trial.clean + trial.attacked) / 2
    assert trial.scores.shape == (6,)
    assert trial.scores.mean() == pytest.approx(trial.score)


def trial(scores: Sequence[float]) -> Trial:
    return Trial((), "", 0.0, 0.0, np.array(scores, np.float64))


def test_weights_do_not_gain_on_themselves() -> None:
    same = trial(np.random.default_rng(0).random(500))
    found = gain(same, same)
    assert found.mean == 0
    assert found.low < 0 < found.high
    assert not found.is_certain


def test_a_gain_on_few_images_is_not_certain_and_on_many_it_is() -> None:
    assert not gain(trial([1.0] * 4), trial([0.5] * 4)).is_certain
    assert gain(trial([1.0] * 400), trial([0.5] * 400)).is_certain
    assert not gain(trial([0.5] * 400), trial([1.0] * 400)).is_certain


def test_chance_seldom_looks_like_a_gain() -> None:
    """Of five candidates without any merit, the best on 200 images is called better in at most 5 % of tries."""
    random, called = np.random.default_rng(0), 0
    for _ in range(400):
        own = trial(random.integers(0, 3, 200) / 2)
        best = max((trial(random.integers(0, 3, 200) / 2) for _ in range(5)), key=lambda each: each.scores.mean())
        called += gain(best, own, 5).is_certain
    assert called <= 20
