"""A small bundle as the tests of defences and attackers evaluate it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from evaluation.defences import Defence, Subject


@pytest.fixture(scope="module")
def subject(nvae_bundle: Path) -> "Iterator[Subject]":
    from evaluation.defences import Subject
    from handlers.pipeline import Pipeline
    from tests.evaluation.models import of_bundle

    with Pipeline.load(nvae_bundle, runtime="onnxruntime") as pipeline:
        yield Subject(pipeline, None, of_bundle(nvae_bundle))  # type: ignore[arg-type]  # its purifier is not asked


@pytest.fixture(scope="module")
def rows(subject: "Subject") -> "dict[str, Defence]":
    from evaluation.defences import defences

    return defences(subject)
