import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation import contact_sheet, demo
from evaluation.contact_sheet import Picture
from evaluation.signs import Sign, drawn_signs
from handlers.pipeline import Pipeline
from tests import bundles

CLASSES = tuple(f"class {i}" if i != 14 else "stop" for i in range(43))
DEFAULT: Any = SimpleNamespace(recipe=SimpleNamespace(classes=CLASSES))


def _row(true: int, attacked: int, purified: int) -> dict[str, Any]:
    row = {"name": CLASSES[true], "true": true, "clean": true, "clean_purified": true, "clean_flagged": False}
    return {**row, "attacked": attacked, "purified": purified, "agreement": 0.875, "flagged": True, "l2": 0.5}


def _content(stop: dict[str, Any]) -> dict[str, Any]:
    counts = ("images", "clean", "clean_purified", "fooled", "purified", "flagged", "clean_flagged")
    return {"images": [_row(1, 2, 1), stop], "counts": dict.fromkeys(counts, 2)}


@pytest.mark.parametrize(
    ("attacked", "purified", "words"),
    [(3, 14, "stop sign again"), (3, 5, "did not help this time"), (14, 14, "The attack on the stop sign failed")],
)
def test_the_headline_is_honest(attacked: int, purified: int, words: str) -> None:
    assert words in demo.conclusion(DEFAULT, _content(_row(14, attacked, purified)))[0]


def test_the_table_marks_what_went_wrong() -> None:
    lines = demo.table(DEFAULT, [_row(1, 2, 1), _row(1, 2, 2), _row(1, 1, 1)])
    assert "<-" not in lines[1]
    assert lines[2].endswith("not recovered")
    assert lines[3].endswith("the attack failed")


def test_what_is_kept_has_every_resampled_latent_drawn_anew(nvae_bundle: Path) -> None:
    with Pipeline.load(nvae_bundle, runtime="onnxruntime") as pipeline:
        manifest = dataclasses.replace(pipeline.manifest, alphas={"fine": (0.0, 0.4)}, default_alphas="fine")
        pipeline.manifest = manifest
        images = bundles.images(3)
        shown = demo.purify(pipeline, list(images))
        kept = pipeline.run(images, samples=1, seeds=range(3), alphas=[0.0, 1.0])
        served = pipeline.run(images, samples=2, seeds=range(3))
    expected = np.concatenate([kept.purified, served.purified], axis=1).transpose(0, 1, 3, 4, 2)
    labels = np.concatenate([kept.sample_labels, served.sample_labels], axis=1)
    for i, pictures in enumerate(shown):
        assert [picture.read for picture in pictures] == [manifest.classes[label] for label in labels[i]]
        for picture, pixels in zip(pictures, expected[i], strict=True):
            assert np.abs(picture.pixels / 255.0 - pixels).max() <= 0.5 / 255 + 1e-6
        assert not np.array_equal(pictures[1].pixels, pictures[2].pixels)


def test_the_contact_sheet_shows_the_pixels_and_colours_the_answers(tmp_path: Path) -> None:
    clean = drawn_signs()[0].image
    attacked = (clean.astype(int) + 2).clip(0, 255).astype(np.uint8)
    other = "priority at next intersection"
    answer: Any = {"clean": {"unpurified": {"label": "stop"}}, "attacked": {"unpurified": {"label": other}}}
    answer["attacked"] |= {"label": "stop", "samples": 8}
    pictures = [Picture(clean, other), Picture(attacked, "stop"), Picture(clean, other)]
    sign = Sign("stop", 14, clean)
    demo.save_sheet([sign] * 3, [attacked] * 3, [answer] * 3, [pictures] * 3, tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[1] == 1400
    top, side = contact_sheet._TOP, contact_sheet.side_of(6)
    spans = [slice(left := contact_sheet.left_of(0, i, 6, side), left + side) for i in range(6)]
    for span, expected in zip(spans, (clean, attacked, None, clean, attacked, clean), strict=True):
        if expected is not None:
            assert np.array_equal(pixels[top : top + side : side // 32, span][:, :: side // 32], expected)
    assert set(np.unique(pixels[top : top + side, spans[2]])) <= {128, 138, 133}
    height = contact_sheet._LINE * contact_sheet._LINES
    captions = pixels[top + side : top + side + height]
    green, red = contact_sheet._GREEN, contact_sheet._RED
    assert [(captions[:, span] == green).all(axis=2).any() for span in spans] == [True, *[False] * 3, True, False]
    assert [(captions[:, span] == red).all(axis=2).any() for span in spans] == [False, True, False, True, False, True]
    votes = pixels[top + side + height : top + side + 2 * height]
    assert [(votes[:, span] == green).all(axis=2).any() for span in spans] == [*[False] * 5, True]
    second = contact_sheet.left_of(1, 5, 6, side)
    assert second + side < 1400 - 12
    assert np.array_equal(pixels[top : top + side : side // 32, second : second + side : side // 32], clean)


def test_two_rows_of_pictures_fit_the_sheet() -> None:
    for pictures in (4, 6):
        side = contact_sheet.side_of(pictures)
        assert side % 32 == 0
        assert 1400 - 2 * 32 * pictures < contact_sheet.left_of(1, pictures - 1, pictures, side) + side < 1400
