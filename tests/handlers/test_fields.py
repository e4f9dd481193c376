"""The strict reader: what fits is read as it is, and everything else is named with what may stand there."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.fields import MAX_PROBLEMS, FieldError, Length, Pattern, Range, read_strict


@dataclass(frozen=True)
class Inner:
    low: int
    high: int = 9

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, must not be above high")


@dataclass(frozen=True)
class Outer:
    MOVED: ClassVar[Mapping[str, str]] = {"old": "write inner.low"}

    name: Annotated[str, Pattern("[a-z]+", "small letters")]
    inner: Inner = Inner(1)
    scale: Annotated[float, Range(0, 10, exclusive=True)] = 1.0
    steps: Annotated[int, Range(1)] = 1
    count: Annotated[int, Range(1, 9)] | Literal["auto"] = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    quiet: bool = False
    file: Path | None = None
    point: tuple[float, float] = (0.0, 0.0)
    words: Annotated[tuple[str, ...], Length(1)] = ("a",)
    tables: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    several: tuple[Inner, ...] = ()
    free: Any = None


FULL = {
    "name": "abc",
    "inner": {"low": 2},
    "scale": 3,
    "steps": 4,
    "count": 5,
    "device": "cuda",
    "quiet": True,
    "file": "a/b",
    "point": [1, 2.5],
    "words": ["x"],
    "tables": {"t": [1, 2]},
    "several": [{"low": 1}, {"low": 2, "high": 3}],
    "free": {"anything": [None]},
}


def test_what_fits_is_read_as_it_is() -> None:
    assert read_strict(Outer, FULL) == Outer(
        "abc",
        Inner(2),
        3.0,
        4,
        5,
        "cuda",
        True,
        Path("a/b"),
        (1.0, 2.5),
        ("x",),
        {"t": (1, 2)},
        (Inner(1), Inner(2, 3)),
        {"anything": [None]},
    )
    assert read_strict(Outer, {"name": "a", "file": None}) == Outer("a")
    assert isinstance(read_strict(Outer, FULL).scale, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nam": "b"}, "there is no field 'nam': the fields are name, inner,"),
        ({"nam": "b"}, "(did you mean 'name'?)"),
        ({"old": 1}, "there is no field 'old': write inner.low"),
        ({1: 2}, "there is no field 1: the fields are"),
        ({"name": "A1"}, "name is 'A1', must be text on one line: small letters"),
        ({"name": 7}, "name is 7, must be text on one line: small letters (in quotes"),
        ({"name": None}, "name is empty, must be text on one line"),
        ({"inner": {"low": 10}}, "inner: low is 10, must not be above high"),
        ({"inner": {"high": 1}}, "inner.low is missing, must be a whole number"),
        ({"inner": {"low": 1, "lov": 1}}, "there is no field 'lov' in inner: the fields are low, high (did you mean"),
        ({"inner": [2, 4]}, "inner is [2, 4], must be a mapping with low, high: write {low: 2, high: 4}"),
        ({"inner": 3}, "inner is 3, must be a mapping with low, high"),
        ({"scale": 0}, "scale is 0, must be a number above 0 and at most 10"),
        ({"scale": float("nan")}, "scale is nan, must be a number"),
        ({"scale": 10**400}, "must be a number above 0"),
        ({"scale": True}, "scale is True, must be a number"),
        (
            {"scale": "1e3"},
            "scale is '1e3', must be a number above 0 and at most 10 (without quotes and, in YAML, with",
        ),
        ({"steps": 0}, "steps is 0, must be a whole number, 1 or more"),
        ({"steps": 1.0}, "steps is 1.0, must be a whole number"),
        ({"steps": False}, "steps is False, must be a whole number"),
        ({"count": 10}, "count is 10, must be a whole number from 1 to 9 or auto"),
        ({"count": "atuo"}, "must be a whole number from 1 to 9 or auto (did you mean 'auto'?)"),
        ({"count": 10**5000}, "count is a very large int, must be"),
        ({"device": "cuad"}, "device is 'cuad', must be cpu or cuda (did you mean 'cuda'?)"),
        ({"device": ["cpu"]}, "device is ['cpu'], must be cpu or cuda"),
        ({"quiet": "yes"}, "quiet is 'yes', must be true or false"),
        ({"quiet": 1}, "quiet is 1, must be true or false"),
        ({"file": " "}, "file is ' ', must be the path of a file"),
        ({"file": "a\0b"}, "must be the path of a file"),
        ({"point": [1]}, "point is [1], must be a list of 2 numbers"),
        ({"point": [1, "b"]}, "point[1] is 'b', must be a number"),
        ({"point": 1}, "point is 1, must be a list of 2 numbers"),
        ({"words": []}, "words is [], must be a list of texts on one line, 1 or more"),
        ({"words": ["a", False]}, "words[1] is False, must be text on one line (in quotes: YAML reads"),
        ({"words": ["a\nb"]}, "words[0] is 'a\\nb', must be text on one line"),
        ({"words": ["\ud800"]}, "words[0] is"),
        ({"words": "a"}, "words is 'a', must be a list"),
        ({"tables": [1]}, "tables is [1], must be a mapping from names to lists of whole numbers"),
        ({"tables": {3: [1]}}, "a name in tables is 3, must be text"),
        ({"tables": {"t": [1, None]}}, "tables.t[1] is empty, must be a whole number"),
        ({"several": [{"low": 1}, {}]}, "several[1].low is missing"),
    ],
)
def test_what_does_not_fit_is_named_with_what_may_stand_there(change: dict[Any, Any], message: str) -> None:
    with pytest.raises(FieldError) as caught:
        read_strict(Outer, {**FULL, **change}, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_the_whole_must_be_a_mapping(content: Any) -> None:
    with pytest.raises(FieldError, match=r"the content is .*, must be a mapping with name, inner"):
        read_strict(Outer, content)


def test_all_that_is_wrong_is_said_at_once_but_not_without_end() -> None:
    with pytest.raises(FieldError, match=r"^name is 1, .*; steps is 0, .*; quiet is 2, [^;]*$"):
        read_strict(Outer, {"name": 1, "steps": 0, "quiet": 2})
    with pytest.raises(FieldError, match=f"; and {1000 - MAX_PROBLEMS} more$"):
        read_strict(Outer, {"name": "a", "words": [1] * 1000})


def test_a_file_of_nothing_but_slips_costs_no_more_than_one_of_none() -> None:
    """Counted in calls of functions, which no busy machine changes."""

    def calls(content: Any) -> int:
        made = 0

        def count(_frame: object, event: str, _argument: object) -> None:
            nonlocal made
            made += event == "call"

        sys.setprofile(count)
        try:
            read_strict(Outer, content)
        except FieldError:
            pass
        finally:
            sys.setprofile(None)
        return made

    right = calls({"name": "a", "words": ["a"] * 10_000})
    assert calls({"name": "a", "words": [1] * 10_000}) < 2 * right
    assert calls({"name": "a", **{f"nam{i}": 1 for i in range(10_000)}}) < 2 * right


def test_a_value_that_aliases_repeat_is_counted_as_often() -> None:
    line = list(range(2000))
    with pytest.raises(FieldError, match="more than 1000000 values"):
        read_strict(Outer, {"name": "a", "tables": {f"t{i}": line for i in range(2000)}})
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(FieldError, match=r"words\[0\] is"):
        read_strict(Outer, {"name": "a", "words": itself})


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@given(st.sampled_from([*FULL, "nmae"]), anything)
def test_whatever_stands_in_a_field_it_is_read_or_refused(name: str, value: Any) -> None:
    try:
        read = read_strict(Outer, {**FULL, name: value}, "my.yaml")
    except FieldError as error:
        assert name in str(error)  # noqa: PT017
        assert len(str(error)) < 2000  # noqa: PT017
    else:
        assert read_strict(Outer, {**FULL, name: value}) == read or value != value or name == "free"
