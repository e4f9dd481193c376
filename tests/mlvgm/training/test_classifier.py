"""The sign classifier learns, and the benchmark's own folders are read."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mlvgm.training.classifier import accuracy, train_classifier
from mlvgm.training.data import Signs, load_signs, split_by_track
from mlvgm.training.loop import cosine_rate
from mlvgm.vgg import VGG11
from tests.mlvgm.training.spawned import spawned


@pytest.fixture
def signs() -> Signs:
    """Images of one colour each, which is their label."""
    rng = np.random.default_rng(0)
    labels = np.arange(192) % 3
    images = np.full((192, 32, 32, 3), 40, np.uint8)
    for i, label in enumerate(labels):
        images[i, :, :, label] = 180 + rng.integers(0, 40)
    return Signs(images, labels, np.arange(192) // 4)


def learnt_accuracy(signs: Signs) -> float:
    torch.manual_seed(0)
    model = train_classifier(signs, signs, VGG11(3, width=0.125, pool=1), epochs=60)
    return accuracy(model, signs)


def test_a_classifier_learns_colours(signs: Signs) -> None:
    assert spawned(learnt_accuracy, signs) > 0.9


def test_tracks_stay_on_one_side(signs: Signs) -> None:
    train, validation = split_by_track(signs, share=0.25)
    assert train.tracks is not None
    assert validation.tracks is not None
    sides = [set(zip(part.labels.tolist(), part.tracks.tolist(), strict=True)) for part in (train, validation)]
    assert not sides[0] & sides[1]
    assert len(train) + len(validation) == len(signs)
    assert 30 <= len(validation) <= 70


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [cosine_rate(step, 100, warmup=10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.02


def test_a_folder_without_signs_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither train\.npz nor the official folder Final_Training"):
        load_signs(tmp_path, "train")


def test_official_folders_are_read(tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "Final_Training" / "Images" / "00014"
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 44), (200, 0, 0)).save(folder / "00003_00001.ppm")
    (tmp_path / "Final_Test" / "Images").mkdir(parents=True)
    Image.new("RGB", (30, 30), (0, 200, 0)).save(tmp_path / "Final_Test" / "Images" / "00000.ppm")
    (tmp_path / "Final_Test" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;16\n")
    (tmp_path / "Final_Test" / "Images" / "GT-final_test.test.csv").write_text("Filename;Width\n00000.ppm;40\n")
    train, test = load_signs(tmp_path, "train"), load_signs(tmp_path, "test")
    assert (train.labels.tolist(), train.tracks.tolist() if train.tracks is not None else None) == ([14], [3])
    assert train.images[0, 16, 16].tolist() == [200, 0, 0]
    assert test.labels.tolist() == [16]
