from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import defences
from evaluation.attacks import predict, to_float
from evaluation.defences import Defence, Subject
from handlers.image import decode
from tests import bundles
from tests.evaluation.models import of_bundle, shipped


def test_the_rows_and_their_order(rows: dict[str, Defence], subject: Subject) -> None:
    assert list(rows) == ["none", "blur", "noise", "jpeg", "bits", "kept", "one", "served"]
    assert "vote of 5" in rows["served"].title
    other = defences.defences(subject, samples=3, served="none")
    assert list(other)[-2:] == ["served", "linear"]
    assert "none schedule" in other["served"].title
    assert "vote of 3" in other["linear"].title


def test_the_bare_classifier(rows: dict[str, Defence], nvae_bundle: Path) -> None:
    images = bundles.images(70)
    found = rows["none"].serve(images, range(70))
    assert np.array_equal(found.labels, predict(of_bundle(nvae_bundle), images))
    assert not found.flagged.any()
    assert (found.agreement == 1).all()
    first, second = of_bundle(nvae_bundle)(to_float(images)).softmax(dim=1).topk(2).values.T
    assert found.scores == pytest.approx((second / first).numpy(), rel=1e-4)  # nothing moves the answer


def test_the_purifier_reads_as_the_pipeline_does(rows: dict[str, Defence], subject: Subject) -> None:
    images = bundles.images(70)
    found = rows["served"].serve(images, range(9, 79))
    result = subject.pipeline.run(images, samples=5, seeds=range(9, 79))
    assert np.array_equal(found.labels, result.labels)
    assert np.array_equal(found.sample_labels, result.sample_labels)
    assert np.array_equal(found.flagged, result.flagged)
    assert found.agreement == pytest.approx(result.agreement)
    assert found.scores == pytest.approx(result.scores, abs=1e-6)
    assert found.deviation == pytest.approx(result.purified.std(axis=1).mean(axis=(1, 2, 3)), rel=1e-5)
    assert 0 < found.flagged.mean() < 1


def test_a_number_of_samples_of_its_own_for_each_image(subject: Subject) -> None:
    """As many samples as the vote needs: the rest of the voters is -1, and counts for nothing."""
    row = defences.defences(subject, samples="auto")["served"]
    found = row.serve(bundles.images(70), range(70))
    drawn = (found.sample_labels >= 0).sum(axis=1)
    assert drawn.min() < drawn.max()
    assert (found.agreement * drawn).round(6) == pytest.approx((found.sample_labels == found.labels[:, None]).sum(1))
    assert np.isfinite(found.deviation).all()


def test_where_nothing_is_resampled_one_sample_is_enough(rows: dict[str, Defence]) -> None:
    found = rows["kept"].serve(bundles.images(5), range(5))
    assert not rows["kept"].is_random
    assert found.sample_labels.shape == (5, 1)


@pytest.mark.parametrize("name", ["none", "blur", "noise", "jpeg", "bits", "kept", "one", "served"])
def test_an_answer_depends_on_the_image_and_its_seed_alone(name: str, rows: dict[str, Defence]) -> None:
    images = bundles.images(6)
    whole, part = rows[name].serve(images, range(6)), rows[name].serve(images[4:], range(4, 6))
    assert np.array_equal(whole.labels[4:], part.labels)
    assert whole.logits[4:] == pytest.approx(part.logits, abs=1e-4)


@pytest.mark.parametrize("name", ["none", "blur", "jpeg", "bits"])
def test_attackers_meet_what_is_served(name: str, rows: dict[str, Defence]) -> None:
    images = bundles.images(9)
    x = to_float(images).requires_grad_()
    logits = rows[name].forward(x, 1).logits
    assert np.abs(logits[0].detach().numpy() - rows[name].serve(images, range(9)).logits).max() < 1e-3
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.flatten(1).norm(dim=1).min() > 0


def test_simple_defences_change_images(rows: dict[str, Defence]) -> None:
    images = bundles.images(20)
    for name in ("blur", "jpeg", "bits"):
        found = rows[name].serve(images, range(20))
        assert found.flagged.any(), name
        assert (found.scores[found.flagged] > 0).all()
    flat = np.full((2, 8, 8, 3), 255, np.uint8)
    for name in ("blur", "jpeg", "bits"):
        assert not rows[name].serve(flat, range(2)).flagged.any(), name
    loud = rows["noise"].serve(images, range(20))
    assert loud.sample_labels.shape == (20, 5)
    assert loud.agreement.min() < 1


def test_gaussian_noise_is_of_the_size_asked_for() -> None:
    grey = np.full((4, 32, 32, 3), 128, np.uint8)
    noisy = defences.gaussian(grey, 0.12, range(4))
    assert noisy.dtype == np.uint8
    assert (noisy / 255.0).std() == pytest.approx(0.12, abs=0.003)
    assert np.array_equal(noisy, defences.gaussian(grey, 0.12, range(4)))
    assert not np.array_equal(noisy[0], noisy[1])
    assert defences.gaussian(np.full_like(grey, 255), 0.12, range(4)).min() > 60


def test_gradients_go_through_the_whole_purifier_with_fresh_noise() -> None:
    default = shipped()
    manifest = type("Manifest", (), {"input_noise_l2": 0.0})
    subject = Subject(type("Pipeline", (), {"manifest": manifest}), default.purifier, default.classifier)  # type: ignore[arg-type]
    row = defences._purifier(subject, "served", "", [0.5] * default.purifier.n_latents, 2)
    images = to_float(bundles.images(2).repeat(4, axis=1).repeat(4, axis=2)).requires_grad_()
    trace = row.forward(images, 3)
    assert trace.logits.shape == (3, 2, len(default.recipe.classes))
    assert not torch.allclose(trace.logits[0], trace.logits[1])
    assert not torch.allclose(trace.logits, row.forward(images, 3).logits)
    (gradient,) = torch.autograd.grad(trace.logits.sum(), images)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    assert list(trace.stages) == ["encode", "decode", "classify"]


def test_a_server_is_asked_image_by_image(rows: dict[str, Defence], subject: Subject) -> None:
    images = bundles.images(3)

    class Client:
        """Answers as a server would: the class that the image is of, and most of the classes."""

        def predict(self, image: bytes, model: str, top_k: int) -> dict[str, object]:
            assert (model, top_k) == ("tiny", 3)
            place = next(i for i in range(3) if np.array_equal(decode(image, (8, 8)), images[i]))
            top = [{"index": place, "confidence": 0.75}, {"index": (place + 1) % 3, "confidence": 0.25}]
            return {"index": place, "top_k": top, "flagged": place == 1, "score": 0.5 * place}

    row = defences.remote(rows["served"], Client(), "tiny", 3)  # type: ignore[arg-type]
    found = row.serve(images, range(3))
    assert found.labels.tolist() == [0, 1, 2]
    assert found.flagged.tolist() == [False, True, False]
    assert found.scores.tolist() == [0, 0.5, 1]
    assert found.logits.argmax(axis=1).tolist() == [0, 1, 2]
    assert np.isfinite(found.logits).all()
    assert row.forward is rows["served"].forward
