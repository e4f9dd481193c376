"""Training on drawn images: the bound improves, a killed run ends in the same weights, bad shapes are refused."""

import dataclasses
import json
import multiprocessing
import os
import signal
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mlvgm.nvae import NVAE
from mlvgm.training import trial
from mlvgm.training.bound import answer_divergence, evidence_lower_bound
from mlvgm.training.images import ImageSet, to_tensor
from mlvgm.training.nvae import CHECKPOINT, LOG, begin, recalibrated, train_nvae, with_noise
from mlvgm.training.publish import write_weights
from mlvgm.training.settings import Shape, TrainingError, TrainingSettings
from mlvgm.training.trial import StepCost, try_step
from tests.mlvgm.training.spawned import spawned

SHAPE = Shape((1, 2), latent_channels=2, channels=4, mixtures=2)
SETTINGS = TrainingSettings(32, SHAPE, steps=24, batch=16, warmup=2)


fitted = partial(train_nvae, channels_last=False)
"""With channels last, PyTorch cannot train a shape as narrow as this on every processor (`mlvgm.training.trial`)."""


def images(count: int = 96) -> ImageSet:
    """Images of one colour each, the last third held out."""
    random = np.random.default_rng(0)
    pixels = np.broadcast_to(random.integers(0, 256, (count, 1, 1, 3), np.uint8), (count, 32, 32, 3))
    places = np.arange(count)
    return ImageSet(pixels, places[: count * 2 // 3], places[count * 2 // 3 :], (), "drawn", "digest")


def likelihoods(work: Path) -> tuple[float, float]:
    """Of held-out images, before and after training."""
    torch.manual_seed(0)
    held_out = to_tensor(images().images[images().validation])
    trained, _ = fitted(SETTINGS, images(), work)
    with torch.no_grad():
        before = evidence_lower_bound(NVAE(SHAPE.config(32)), held_out).log_likelihood.mean()
        after = evidence_lower_bound(trained, held_out).log_likelihood.mean()
    return float(before), float(after)


def test_the_bound_improves(tmp_path: Path) -> None:
    before, after = spawned(likelihoods, tmp_path)
    assert after > before
    assert len((tmp_path / LOG).read_text().splitlines()) == 1


def test_the_share_of_noisy_images_gets_noise_within_the_range() -> None:
    settings = dataclasses.replace(SETTINGS, noise=0.2, least_noise=0.1, noisy=0.5)
    torch.manual_seed(0)
    grey = torch.full((400, 3, 32, 32), 0.5)
    sigma = (with_noise(grey, settings) - grey).flatten(1).std(dim=1)
    noisy = sigma > 0.075
    assert 0.4 < noisy.float().mean() < 0.6
    assert 0.09 < sigma[noisy].min() < 0.11
    assert 0.18 < sigma[noisy].max() < 0.21
    assert sigma[~noisy].max() < 0.055


def test_statistics_are_those_of_all_images_with_the_noise_of_training() -> None:
    """Behind a first convolution, noise adds to the variance; and images of one kind in a row do not take from it."""
    sorted_ = images(256)
    order = np.argsort(sorted_.images[:, 0, 0, 0])
    places = dataclasses.replace(sorted_, train=order, validation=order[:1])

    def variance(noise: float, of: ImageSet = places) -> float:
        settings = dataclasses.replace(SETTINGS, noise=noise, least_noise=noise, noisy=1.0)
        torch.manual_seed(0)
        found = recalibrated(NVAE(SHAPE.config(32)), of, settings)
        return float(next(m for m in found.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_var.mean())

    mixed = dataclasses.replace(places, train=np.random.default_rng(1).permutation(order))
    assert variance(0.0) == pytest.approx(variance(0.0, mixed), rel=0.1)
    assert variance(0.3) > 1.05 * variance(0.0)


def colour() -> torch.nn.Module:
    """A classifier that tells which channel is the brightest."""
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), Sharp())


class Sharp(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return 20.0 * values


def divergence_of_answers(settings: TrainingSettings, work: Path) -> float:
    """Of held-out images, after training."""
    trained, _ = fitted(settings, images(), work)
    held_out = to_tensor(images().images[images().validation])
    torch.manual_seed(0)
    with torch.no_grad():
        purified = evidence_lower_bound(trained, held_out).reconstruction
        return float(answer_divergence(colour(), held_out, purified).mean())


def test_a_classifier_makes_purification_keep_its_answers(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=60)
    without = spawned(divergence_of_answers, settings, tmp_path / "without")
    kept = dataclasses.replace(settings, classifier=f"{__name__}:colour", stability=5.0)
    assert spawned(divergence_of_answers, kept, tmp_path / "with") < 0.9 * without
    reports = [json.loads(line) for line in (tmp_path / "with" / LOG).read_text().splitlines()]
    assert reports[-1]["answer_divergence"] > 0


def weights(work: Path, kill_at: int) -> dict[str, torch.Tensor]:
    """The trained weights; the process is killed when it has drawn the picture of step ``kill_at``."""

    def kill(_: NVAE, step: int) -> None:
        if step == kill_at:
            os._exit(9)

    return dict(fitted(SETTINGS, images(), work, draw=kill, draw_every=5)[0].state_dict())


def test_a_killed_run_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = spawned(weights_saved_often, tmp_path / "a", 0)
    with pytest.raises(Exception, match="terminated abruptly"):
        spawned(weights_saved_often, tmp_path / "b", 15)
    (tmp_path / "b" / LOG).write_text("edited")  # it is not read
    assert torch.load(tmp_path / "b" / CHECKPOINT, weights_only=True)["step"] == 14
    resumed = spawned(weights_saved_often, tmp_path / "b", 0)
    assert undisturbed.keys() == resumed.keys()
    for key, value in undisturbed.items():
        assert torch.equal(value, resumed[key]), key
    assert (tmp_path / "a" / LOG).read_text() == (tmp_path / "b" / LOG).read_text()


def weights_saved_often(work: Path, kill_at: int) -> dict[str, torch.Tensor]:
    from mlvgm.training import nvae

    nvae.SAVE_EVERY, nvae.REPORT_EVERY = 7, 5
    return weights(work, kill_at)


def train(settings: TrainingSettings, work: Path) -> torch.Tensor:
    """One of the trained weights; a whole network cannot travel between processes."""
    return fitted(settings, images(), work)[0].const_prior.detach()


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, steps=2)
    spawned(train, settings, tmp_path)
    with pytest.raises(TrainingError, match="other settings or images"):
        spawned(train, dataclasses.replace(settings, beta=0.5), tmp_path)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size * 2 // 3)


def _flip(file: Path) -> None:
    """One bit of a weight."""
    with zipfile.ZipFile(file) as zipped:
        weight = zipped.read(max(zipped.infolist(), key=lambda member: member.file_size))
    content = bytearray(file.read_bytes())
    content[content.index(weight) + len(weight) // 2] ^= 1
    file.write_bytes(content)


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": _cut,
    "a bit": _flip,
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("{}"),
    "pipe": _pipe,
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "list": lambda file: torch.save([], file),
    "other weights": lambda file: torch.save({"digest": "digest", "network": {"a": torch.zeros(2)}}, file),
    "no reports": lambda file: torch.save({k: v for k, v in torch.load(file).items() if k != "reports"}, file),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named(name: str, tmp_path: Path) -> None:
    file, state = tmp_path / CHECKPOINT, begin(SETTINGS, torch.device("cpu"))
    state.save(file, "digest")
    state.load(file, "digest")
    DAMAGE[name](file)
    with pytest.raises(TrainingError, match=r"checkpoint\.pt is damaged.*: remove it to begin anew"):
        state.load(file, "digest")


def test_training_goes_on_from_weights_of_the_same_shape(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = NVAE(SHAPE.config(32))
    write_weights(network, tmp_path / "start.safetensors")
    # Steps too small to matter: what comes out is what went in.
    settings = dataclasses.replace(SETTINGS, steps=1, rate=1e-12, start=tmp_path / "start.safetensors")
    trained = spawned(train, settings, tmp_path / "work")
    assert torch.allclose(trained, network.const_prior, atol=1e-6)
    other = dataclasses.replace(settings, shape=dataclasses.replace(SHAPE, channels=6))
    with pytest.raises(TrainingError, match=r"start\.safetensors.*has shape"):
        spawned(train, other, tmp_path / "other")


def test_too_few_images_for_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="do not fill one batch"):
        fitted(SETTINGS, images(count=12), tmp_path)


def test_a_trial_tells_what_a_step_costs() -> None:
    found = try_step(SETTINGS, "cpu", threads=1)
    assert found.parameters == sum(p.numel() for p in NVAE(SHAPE.config(32)).parameters())
    assert found.seconds > 0
    assert found.memory > 10_000_000


def test_a_step_that_fails_is_told_in_one_sentence() -> None:
    with pytest.raises(TrainingError, match=r"channels 4.* fails: .*RuntimeError"):
        try_step(SETTINGS, "nonesuch")


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def crash_with_channels_last(settings: TrainingSettings, device: str, threads: int, channels_last: bool) -> StepCost:
    if channels_last:
        crash()
    return StepCost(1.0, 2, 3, channels_last)


def stall(*_: object) -> None:
    time.sleep(600)


def test_a_shape_that_crashes_with_channels_last_is_trained_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_measure", crash_with_channels_last)
    assert try_step(SETTINGS, "cpu") == StepCost(1.0, 2, 3, channels_last=False)


def test_a_step_that_ends_its_process_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_measure", crash)  # whatever the order in memory
    with pytest.raises(TrainingError, match=r"channels 4.* ended its process"):
        try_step(SETTINGS, "cpu")


def test_steps_that_take_too_long_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_measure", stall)
    monkeypatch.setattr(trial, "TIMEOUT", 1)
    with pytest.raises(TrainingError, match="3 steps took more than 1 s"):
        try_step(SETTINGS, "cpu")
    assert not multiprocessing.active_children()
