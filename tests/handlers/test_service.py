import base64
import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from handlers.answer import Response
from handlers.errors import InputError
from handlers.image import decode, encode_png
from handlers.metrics import (
    ANSWERS,
    BATCH,
    DISAGREED,
    FALLBACKS,
    FLAGGED,
    MEASURES,
    QUEUE,
    REASONS,
    REJECTED,
    REQUEST,
    SAMPLES,
    SCORE,
    STAGE,
    SUSPICIOUS,
    Measure,
)
from handlers.pipeline import Pipeline
from handlers.score import ScoreThreshold
from handlers.service import Service
from handlers.settings import HandlerSettings
from tests import bundles
from tests.handlers.hostile import encoded


class Meter(defaultdict[tuple[Measure, str], list[float]]):
    """A sink that keeps every value."""

    def __init__(self) -> None:
        super().__init__(list)

    def __call__(self, measure: Measure, value: float, label: str) -> None:
        self[measure, label].append(value)


WHITE = encode_png(np.ones((3, 8, 8), np.float32))  # overflows in the encoder of this bundle


@pytest.fixture(scope="module")
def pipeline(nvae_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(nvae_bundle, "onnxruntime", threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def service(pipeline: Pipeline) -> Service:
    return Service(pipeline, HandlerSettings(allow_seed=True))


def png(number: int) -> bytes:
    return encode_png(bundles.images(1, seed=number)[0].transpose(2, 0, 1).astype(np.float32) / 255)


def ask(image: bytes, **options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"body": bytearray(image)}, {f"X-Mlvgm-{name.replace('_', '-')}": str(v) for name, v in options.items()}


def said(answer: Response) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(answer.body)
    return content


def test_an_answer_has_all_its_fields(service: Service, pipeline: Pipeline) -> None:
    (answer,) = service.answer([ask(png(0), samples=7, seed=5, top_k=2)])
    result = pipeline.run(bundles.images(1), 7, [5])
    figures = said(answer)
    label, before = int(result.labels[0]), int(result.unpurified_labels[0])
    assert (answer.status, answer.content_type) == (200, "application/json")
    assert figures["label"] == bundles.CLASSES[label]
    assert figures["index"] == label
    assert figures["confidence"] == pytest.approx(result.confidences[0, label], abs=1e-6)
    assert figures["agreement"] == pytest.approx(result.agreement[0], abs=1e-6)
    assert figures["flagged"] == (label != before)
    assert figures["samples"] == 7
    assert figures["score"] == pytest.approx(result.scores[0], abs=1e-6)
    assert figures["unpurified"]["index"] == before
    assert figures["unpurified"]["label"] == bundles.CLASSES[before]
    assert figures["unpurified"]["confidence"] == pytest.approx(result.unpurified_confidences[0, before], abs=1e-6)
    assert len(figures["top_k"]) == 2
    assert figures["top_k"][0]["index"] == label
    assert figures["top_k"][0]["votes"] == result.votes[0, label]
    assert set(figures["timing_ms"]) == {"image", "noise", "encode", "decode", "classify"}
    assert set(figures) == {
        *("label", "index", "confidence", "agreement", "flagged", "score", "unpurified", "top_k", "samples"),
        "timing_ms",
    }


def test_the_purified_image_comes_as_png_with_the_figures_in_a_header(service: Service, pipeline: Pipeline) -> None:
    (answer,) = service.answer([ask(png(0), seed=5, **{"return": "purified"})])
    result = pipeline.run(bundles.images(1), seeds=[5])
    assert answer.content_type == "image/png"
    pixels = decode(answer.body, (8, 8)).transpose(2, 0, 1)
    assert np.abs(pixels / 255 - result.representative(0)).max() < 0.6 / 255
    header = answer.headers["X-Mlvgm-Answer"]
    assert header.isascii()
    assert "\n" not in header
    assert json.loads(header)["label"] == bundles.CLASSES[result.labels[0]]


def test_every_kind_of_fault_leaves_the_neighbours_alone(service: Service) -> None:
    good = [ask(png(i), seed=i) for i in range(5)]
    bad = {
        1: (ask(png(1)[:-30]), 400, "truncated"),
        3: (ask(b"hello"), 400, "not a JPEG"),
        4: (ask(b""), 400, "empty"),
        6: (ask(png(1), samples=0), 400, "1 to 16"),
        7: (ask(WHITE, seed=1), 500, "encode"),
        9: (({}, {}), 400, "one image"),
        10: (ask(WHITE, seed=1, samples=3), 500, "encode"),
    }
    rest = iter(good)
    requests = [bad[i][0] if i in bad else next(rest) for i in range(len(good) + len(bad))]
    answers = service.answer(requests)
    assert len(answers) == len(requests)
    alone = [said(service.answer([request])[0]) for request in good]
    expected = iter(alone)
    for i, answer in enumerate(answers):
        if i in bad:
            _, status, reason = bad[i]
            assert answer.status == status
            assert reason in said(answer)["error"]
        else:
            assert answer.status == 200
            without_times = {k: v for k, v in said(answer).items() if k != "timing_ms"}
            assert without_times == {k: v for k, v in next(expected).items() if k != "timing_ms"}


def test_items_of_one_batch_may_differ_in_their_options(service: Service) -> None:
    requests = [
        ask(png(0), samples=3, seed=1),
        ask(png(1), samples=9, seed=2),
        ask(png(2), samples=3, seed=3, alphas="none"),
        ask(png(3), samples=3, seed=4),
    ]
    answers = [said(answer) for answer in service.answer(requests)]
    assert [answer["samples"] for answer in answers] == [3, 9, 3, 3]
    for request, answer in zip(requests, answers, strict=True):
        alone = said(service.answer([request])[0])
        assert alone["label"] == answer["label"]
        assert alone["confidence"] == pytest.approx(answer["confidence"], abs=1e-5)


def test_auto_says_how_many_samples_were_drawn(service: Service, pipeline: Pipeline) -> None:
    answers = [said(answer) for answer in service.answer([ask(png(i), samples="auto", seed=i) for i in range(6)])]
    images = np.concatenate([bundles.images(1, seed=i) for i in range(6)])
    result = pipeline.run(images, "auto", range(6))
    assert [answer["samples"] for answer in answers] == result.samples.tolist()
    assert len(set(result.samples.tolist())) > 1
    for answer in answers:
        assert sum(entry["votes"] for entry in answer["top_k"]) == answer["samples"]


def several(images: list[bytes], **options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"body": {"images": [base64.b64encode(image).decode() for image in images], **options}}, {}


def test_several_images_of_a_request_are_answered_like_single_ones(service: Service) -> None:
    single = [ask(png(i), seed=40 + i, samples=3) for i in range(3)]
    request = several([png(i) for i in range(3)], seed=40, samples=3)
    answers = service.answer([single[0], request, *single[1:]])
    assert [answer.status for answer in answers] == [200] * 4
    expected = [said(answer) for answer in (answers[0], *answers[2:])]
    for found, alone in zip(said(answers[1])["answers"], expected, strict=True):
        assert found["top_k"] == alone["top_k"]
        assert found["unpurified"] == alone["unpurified"]


def test_a_bad_image_of_several_is_named_in_its_place(service: Service) -> None:
    mixed, hopeless, broken = service.answer(
        [several([png(0), b"hello", WHITE, png(1)]), several([b"hello", b""]), several([WHITE, b"hello"])]
    )
    assert mixed.status == 200
    entries = said(mixed)["answers"]
    assert [entry.get("status") for entry in entries] == [None, 400, 500, None]
    assert "not a JPEG" in entries[1]["error"]
    assert (hopeless.status, broken.status) == (400, 500)


def test_what_overflows_in_half_precision_is_answered_in_fp32(half_bundle: Path, tmp_path: Path) -> None:
    bundles.write_nvae(tmp_path)
    meter = Meter()
    with Pipeline.load(half_bundle, "onnxruntime") as half, Pipeline.load(tmp_path, "onnxruntime") as single:
        requests = [ask(png(0), seed=1), ask(WHITE, seed=2), ask(png(1), seed=3), ask(WHITE, seed=4, samples=2)]
        answers = Service(half, HandlerSettings(allow_seed=True), sink=meter).answer(requests)
        expected = Service(single, HandlerSettings(allow_seed=True)).answer(requests)
    assert [answer.status for answer in answers] == [200] * 4
    for answer, wanted in zip(map(said, answers), map(said, expected), strict=True):
        assert {k: v for k, v in answer.items() if k != "timing_ms"} == {
            k: v for k, v in wanted.items() if k != "timing_ms"
        }
    assert meter[FALLBACKS, "encode"] == [0, 1, 1]
    assert meter[REJECTED, "overflow"] == [0]


def test_what_overflows_in_fp32_too_is_a_500_of_its_own(tmp_path: Path) -> None:
    bundles.write_half(tmp_path, fp32_holds=False)
    meter = Meter()
    with Pipeline.load(tmp_path, "onnxruntime") as half:
        answers = Service(half, sink=meter).answer([ask(png(0)), ask(WHITE), ask(png(1))])
    assert [answer.status for answer in answers] == [200, 500, 200]
    assert "stage encode overflowed" in said(answers[1])["error"]
    assert meter[FALLBACKS, "encode"] == [0, 1]
    assert meter[REJECTED, "overflow"] == [0, 1]


def test_everything_is_measured(pipeline: Pipeline) -> None:
    meter = Meter()
    service = Service(pipeline, HandlerSettings(allow_seed=True), sink=meter)
    answers = service.answer(
        [ask(png(0), seed=1), ask(b"hello"), ask(png(1), samples=0), several([png(2), b"", WHITE]), ask(png(3), seed=2)]
    )
    statuses = [answer.status for answer in answers]
    assert statuses == [200, 400, 400, 200, 200]
    assert meter[ANSWERS, "200"] == [0, 3]
    assert meter[ANSWERS, "400"] == [2]
    assert meter[REJECTED, "image"] == [0, 1, 1]
    assert meter[REJECTED, "request"] == [0, 1]
    assert meter[REJECTED, "overflow"] == [0, 1]
    assert meter[BATCH, ""] == [3]
    assert len(meter[REQUEST, ""]) == 5
    for stage in ("noise", "encode", "decode", "classify"):
        (seconds,) = meter[STAGE, stage]
        assert 0 < seconds < meter[REQUEST, ""][0]
    figures = [said(answers[0]), said(answers[3])["answers"][0], said(answers[4])]
    assert sum(meter[FLAGGED, ""]) == sum(entry["flagged"] for entry in figures)
    assert sum(meter[DISAGREED, ""]) == sum(entry["agreement"] < 1 for entry in figures)
    assert meter[SCORE, ""] == [pytest.approx(entry["score"], abs=1e-6) for entry in figures]
    assert sum(meter[SAMPLES, ""]) == sum(entry["samples"] for entry in figures)
    assert {measure for measure, _ in meter} == set(MEASURES) - {QUEUE}
    assert {label for measure, label in meter if measure is REJECTED} == set(REASONS)


def test_the_self_test_is_not_counted(pipeline: Pipeline) -> None:
    meter = Meter()
    Service(pipeline, sink=meter).self_test()
    assert meter[ANSWERS, "200"] == [0]
    assert (STAGE, "encode") not in meter


def test_what_has_waited_for_too_long_is_refused_at_once(pipeline: Pipeline) -> None:
    meter = Meter()
    came = {name: {"X-Request-Start": f"t={time.time() - age:.3f}"} for name, age in (("now", 1), ("late", 20))}
    body = {"body": png(0)}
    fresh, late, unknown = Service(pipeline, HandlerSettings(max_wait_s=10), sink=meter).answer(
        [(body, came["now"]), (body, came["late"]), (body, {})]
    )
    assert (fresh.status, late.status, unknown.status) == (200, 503, 200)
    assert late.headers == {"Retry-After": "1"}
    assert "try again" in said(late)["error"]
    assert meter[QUEUE, ""] == [pytest.approx(1, abs=0.5), pytest.approx(20, abs=0.5)]
    assert meter[REJECTED, "late"] == [0, 1]
    assert meter[BATCH, ""] == [2]


def test_large_images_are_read_side_by_side(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).random((3, 128, 128), np.float32)
    large = [encode_png(np.roll(noise, i, 2)) for i in range(3)]
    assert sum(map(len, large)) > 32_768
    requests = [ask(large[0], seed=1), ask(large[1][:-9], seed=2), several(large[1:], seed=3), ask(b"no", seed=4)]
    threads: set[str] = set()

    def watched(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        return decode(*arguments)

    alone = [said(service.answer([request])[0]) for request in requests]
    monkeypatch.setattr("handlers.service.decode", watched)
    together = service.answer(requests)
    assert [answer.status for answer in together] == [200, 400, 200, 400]
    assert all(name.startswith("reader") for name in threads)
    assert said(together[0])["top_k"] == alone[0]["top_k"]
    assert [entry["top_k"] for entry in said(together[2])["answers"]] == [e["top_k"] for e in alone[2]["answers"]]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_an_image_that_takes_more_memory_than_there_is_fails_alone(nvae_bundle: Path) -> None:
    """In a process of its own: what earlier tests have given back may be large enough for it."""
    program = f"""
from PIL import Image
from handlers import service
from handlers.pipeline import Pipeline
from tests.handlers.hostile import encoded
service._READING_BYTES = 30_000_000
small, large = (encoded(Image.new("RGB", (side, side)), "PNG") for side in (8, 4000))
pipeline = Pipeline.load({str(nvae_bundle)!r}, "onnxruntime", 1)
answers = service.Service(pipeline).answer([({{"body": body}}, {{}}) for body in (small, large, small)])
assert [answer.status for answer in answers] == [200, 400, 200], answers
assert b"too large" in answers[1].body
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_failing_engine_is_a_500_without_its_words(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret path /srv/x")

    monkeypatch.setattr(pipeline, "run", fail)
    answers = Service(pipeline).answer([ask(png(0)), ask(b"hello")])
    assert [answer.status for answer in answers] == [500, 400]
    assert b"secret" not in answers[0].body


def test_nothing_asked_nothing_answered(service: Service) -> None:
    assert service.answer([]) == []


def test_the_self_test_passes_and_can_fail(
    service: Service, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.self_test()
    monkeypatch.setattr("handlers.service.encode_png", lambda _: WHITE)
    with pytest.raises(RuntimeError, match="encode"):
        service.self_test()


def test_the_self_test_draws_one_sample(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many an image gets by default: those of a large model take a minute."""
    drawn, run = list[object](), Pipeline.run

    def spy(self: Pipeline, images: np.ndarray, samples: object, *more: object, **named: object) -> object:
        drawn.append(samples)
        return run(self, images, samples, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Pipeline, "run", spy)
    Service(pipeline).probe()
    assert drawn == [1]


@pytest.fixture(scope="module")
def halfway(nvae_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A bundle to whose threshold half of eight images come up."""
    folder = tmp_path_factory.mktemp("scored")
    with Pipeline.load(nvae_bundle, "onnxruntime", threads=1) as plain:
        images = np.concatenate([bundles.images(1, seed=i) for i in range(8)])
        scores = np.sort(plain.run(images, seeds=range(8)).scores)
    bundles.write_nvae(folder, score=ScoreThreshold(float(scores[3] + scores[4]) / 2, 0.5, 0.2, 0.8))
    with Pipeline.load(folder, "onnxruntime", threads=1) as loaded:
        yield loaded


EIGHT = [ask(png(i), seed=i) for i in range(8)]


def test_a_suspicious_image_is_said_to_be_one(halfway: Pipeline) -> None:
    meter = Meter()
    answers = Service(halfway, HandlerSettings(allow_seed=True), sink=meter).answer(EIGHT)
    assert [answer.status for answer in answers] == [200] * 8
    threshold = halfway.manifest.score
    assert threshold is not None
    for answer in map(said, answers):
        assert answer["suspicious"] == (answer["score"] > threshold.threshold)
        assert "review" not in answer
    assert sum(said(answer)["suspicious"] for answer in answers) == 4
    assert meter[SUSPICIOUS, ""] == [0, 1, 1, 1, 1]


def test_suspicious_images_can_be_marked_for_review(halfway: Pipeline) -> None:
    answers = Service(halfway, HandlerSettings(allow_seed=True, suspicious="review")).answer(EIGHT)
    assert [said(answer)["review"] for answer in answers] == [said(answer)["suspicious"] for answer in answers]


def test_suspicious_images_can_be_refused(halfway: Pipeline) -> None:
    meter = Meter()
    service = Service(halfway, HandlerSettings(allow_seed=True, suspicious="refuse"), sink=meter)
    answers = service.answer(EIGHT)
    statuses = [answer.status for answer in answers]
    assert sorted(statuses) == [200] * 4 + [422] * 4
    for answer in answers:
        assert set(said(answer)) == {"error", "status"} or not said(answer)["suspicious"]
    assert meter[REJECTED, "suspicious"] == [0, 1, 1, 1, 1]
    (together,) = service.answer([several([png(i) for i in range(8)], seed=0)])
    assert [entry.get("status", 200) for entry in said(together)["answers"]] == statuses


@pytest.mark.parametrize("policy", ["review", "refuse"])
def test_without_a_threshold_nothing_can_be_suspicious(pipeline: Pipeline, policy: str) -> None:
    with pytest.raises(InputError, match="mlvgm tune --score"):
        Service(pipeline, HandlerSettings(suspicious=policy))
    (answer,) = Service(pipeline).answer([ask(png(0))])
    assert "suspicious" not in said(answer)


def test_a_certificate_comes_with_the_answer(pipeline: Pipeline) -> None:
    service = Service(
        pipeline, HandlerSettings(allow_seed=True, certify_draws=200, certify_sigma=0.01, certify_alpha=0.05)
    )
    plain, certified, purified = service.answer(
        [ask(png(0), seed=1), ask(png(0), seed=1, certify=200), ask(png(0), certify=20, **{"return": "purified"})]
    )
    assert "abstained" not in said(plain)
    answer = said(certified)
    assert answer["top_k"] == said(plain)["top_k"]
    assert (answer["sigma"], answer["alpha"], answer["draws"]) == (0.01, 0.05, 200)
    assert answer["abstained"] == (answer["certified_label"] is None) == (answer["certified_l2"] == 0)
    assert answer["certified_label"] in (None, *bundles.CLASSES)
    assert json.loads(purified.headers["X-Mlvgm-Answer"])["draws"] == 20


def test_a_certificate_that_fails_harms_no_other_answer(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipeline, "certify", fail)
    meter = Meter()
    service = Service(pipeline, HandlerSettings(certify_draws=20), sink=meter)
    answers = service.answer([ask(png(0)), ask(png(0), certify=20), ask(png(1))])
    assert [answer.status for answer in answers] == [200, 500, 200]
    assert said(answers[1])["error"] == "the image could not be answered"
    assert meter[REJECTED, "internal"][-1] == 1


def test_certificates_are_kept_within_the_budget(pipeline: Pipeline) -> None:
    service = Service(pipeline, HandlerSettings(certify_draws=20))
    requests = [
        ask(png(0), certify=21),
        several([png(0), png(1)], certify=11),
        several([png(0), png(1)], certify=10),
        ask(png(0), certify="many"),
    ]
    answers = service.answer(requests)
    assert [answer.status for answer in answers] == [400, 400, 200, 400]
    assert "1 to 20" in said(answers[0])["error"]
    assert "1 to 10" in said(answers[1])["error"]
    assert [entry["draws"] for entry in said(answers[2])["answers"]] == [10, 10]
    (refused,) = Service(pipeline).answer([ask(png(0), certify=1)])
    assert refused.status == 400
    assert "certifies no answers" in said(refused)["error"]


def test_a_batch_holds_no_costly_request_of_a_client_that_shares_beside_those_of_others(pipeline: Pipeline) -> None:
    most = pipeline.manifest.samples.max
    large = encoded(Image.new("L", (2200, 2000)), "PNG")
    costly = [several([png(0)] * 4), several([png(0)] * 2, samples=most // 2 + 1), ask(large), several([png(0), large])]
    ordinary = [ask(png(1)), ask(png(2), samples=most), several([png(0)] * 2, samples=most // 2)]
    meter = Meter()
    service = Service(pipeline, sink=meter)

    def statuses(*batch: tuple[str, tuple[dict[str, Any], dict[str, Any]]]) -> list[int]:
        named = [(fields, headers | {"X-Sharing-Client": client}) for client, (fields, headers) in batch]
        return [answer.status for answer in service.answer(named)]

    for request in costly:
        assert statuses(("a", request), ("a", ordinary[0])) == [200, 200], "there is no other client"
        assert statuses(("", request), ("a", ordinary[0])) == [200, 200], "this client does not share"
        assert statuses(("a", request), ("b", ordinary[0])) == [503, 200]
        assert statuses(("b", ordinary[0]), ("", ordinary[1]), ("a", request)) == [200, 200, 503]
    assert sum(meter[REJECTED, "shared"]) == 2 * len(costly)
    assert statuses(*(("a", each) for each in ordinary), ("b", ordinary[0])) == [200] * 4
    refused, _ = service.answer([(costly[2][0], {"X-Sharing-Client": "a"}), several([])])
    assert refused.status == 200, "what cannot be read has no client"
