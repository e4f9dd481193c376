from pathlib import Path

import numpy as np

from evaluation.tuning import Trial, Weights, objective, ranked, schedules, search
from handlers.pipeline import Pipeline
from tests import bundles

TARGET = (0.2, 0.9, 0.0, 0.55)


def near_target(weights: Weights, origin: str) -> Trial:
    distance = float(np.abs(np.array(weights) - TARGET).mean())
    return Trial(weights, origin, clean=1 - distance, attacked=1 - distance)


def test_finds_weights_that_no_schedule_has() -> None:
    trials = search(near_target, 4, trials=300)
    best_schedule = max(near_target(weights, name).score for name, weights in schedules(4))
    assert best_schedule < 0.85
    assert trials[0].score > 0.95
    assert trials == ranked(trials)


def test_keeps_to_the_number_of_trials_and_never_repeats_one() -> None:
    asked: list[Weights] = []

    def score(weights: Weights, origin: str) -> Trial:
        asked.append(weights)
        return near_target(weights, origin)

    lines: list[str] = []
    for limit in (3, 24, 40):
        asked.clear()
        lines.clear()
        assert len(search(score, 4, limit, lines.append)) == len(asked) == len(set(asked)) == len(lines) == limit


def test_weights_stay_in_range() -> None:
    def towards_one(weights: Weights, origin: str) -> Trial:
        return Trial(weights, origin, sum(weights), sum(weights))

    for trial in search(towards_one, 3, trials=200):
        assert all(0 <= weight <= 1 for weight in trial.weights)


def test_the_score_is_the_mean_of_clean_and_attacked(nvae_bundle: Path) -> None:
    images, other = bundles.images(6), bundles.images(6, seed=1)
    with Pipeline.load(nvae_bundle, runtime="onnxruntime") as pipeline:
        weights = (0.0, 0.0)
        labels = pipeline.run(images, samples=1, seeds=range(6), alphas=list(weights)).labels
        wrong = pipeline.run(other, samples=1, seeds=range(6), alphas=list(weights)).labels
        trial = objective(pipeline, images, {"a": images, "b": other}, labels, samples=2)(weights, "none")
    assert trial.clean == 1.0
    assert trial.attacked == (1.0 + (wrong == labels).mean()) / 2
    assert trial.score == (trial.clean + trial.attacked) / 2
