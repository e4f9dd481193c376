"""Hostile requests are hostile: the service itself, without any server, refuses each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.server.calls import Call
from handlers.pipeline import Pipeline
from handlers.service import Service
from handlers.settings import HandlerSettings
from tests.stress.corpus import hostile_calls


@pytest.fixture(scope="module")
def service(nvae_bundle: Path) -> Iterator[Service]:
    with Pipeline.load(nvae_bundle, "onnxruntime", 1) as pipeline:
        yield Service(pipeline, HandlerSettings(allow_seed=True))


def headers_of(call: Call) -> dict[str, str]:
    lines = call.headers.decode().split("\r\n")[:-1]
    return dict(line.split(": ", 1) for line in lines)


def test_every_request_is_refused(service: Service) -> None:
    calls = [call for call in hostile_calls("tiny", 16) if call.start is None]
    whole = [call for call in calls if not headers_of(call)["Content-Type"].startswith("multipart")]
    assert len(whole) > 150
    answers = service.answer([({"body": call.body}, headers_of(call)) for call in whole])
    wrong = {call.kind: answer.body for call, answer in zip(whole, answers, strict=True) if answer.status != 400}
    assert wrong.keys() <= {"web form", "image as a web form"}, "those the server itself takes apart"


def test_kinds_are_many_and_the_same_every_time() -> None:
    calls = hostile_calls("tiny", 16)
    assert calls == hostile_calls("tiny", 16)
    assert len({call.kind for call in calls}) > 50
    assert all(call.label is None for call in calls)
    assert sum(len(call.body) for call in calls) < 20e6
