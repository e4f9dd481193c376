"""Read YAML and JSON into dataclasses. Every field is checked; errors name the field, its value and what is allowed.

`read_strict(cls, content, where)` reads by the type hints of ``cls``: str, int, float, bool, Path, None, Any, Literal,
unions, tuple, dict or Mapping, dataclasses, and Annotated with a `Range`, `Length` or `Pattern`. Conditions between
fields are checked by ``__post_init__``, which raises ValueError. Renamed fields are listed in a ClassVar ``MOVED``: the
old name, and what to write instead.

>>> @dataclass(frozen=True)
... class Settings:
...     steps: Annotated[int, Range(1)]
...     device: Literal["cpu", "cuda"] = "cpu"
>>> read_strict(Settings, {"steps": 0, "device": "cude"}, "my.yaml")
Traceback (most recent call last):
FieldError: my.yaml: steps is 0, must be a whole number, 1 or more; device is 'cude', must be cpu or cuda (did you ...
"""

import dataclasses
import difflib
import functools
import math
import re
import reprlib
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from handlers.errors import MlvgmError

MAX_VALUES = 1_000_000
"""Largest number of values in a file; YAML aliases count as often as they are used."""
MAX_PROBLEMS = 5
"""Largest number of wrong fields in one message."""

T = TypeVar("T")
_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text on one line", "texts on one line"),
    Path: ("the path of a file", "paths of files"),
}
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother = 2, 60, 60


class FieldError(MlvgmError, ValueError):
    """Fields of a file are unknown, missing, or have wrong values; the message names all of them."""


@dataclass(frozen=True)
class Range:
    """Allowed range of a number: from ``low`` (or above ``low`` if that is excluded) to ``high``."""

    low: float
    high: float = math.inf
    exclusive: bool = False

    def allows(self, value: float) -> bool:
        return self.low <= value <= self.high and not (self.exclusive and value == self.low)

    def __str__(self) -> str:
        if self.exclusive:
            return f" above {self.low:.15g}" + ("" if math.isinf(self.high) else f" and at most {self.high:.15g}")
        return f", {self.low:.15g} or more" if math.isinf(self.high) else f" from {self.low:.15g} to {self.high:.15g}"


@dataclass(frozen=True)
class Length:
    """Allowed length of a text, tuple or mapping: from ``low`` to ``high`` characters or entries."""

    low: int
    high: int = 1_000_000

    def allows(self, value: Any) -> bool:
        return self.low <= len(value) <= self.high

    def __str__(self) -> str:
        return f", {self.low} or more" if self.high >= 1_000_000 else f", {self.low} to {self.high} long"


@dataclass(frozen=True)
class Pattern:
    """Regular expression that a whole text must match, and its description for messages."""

    regex: str
    words: str

    def allows(self, value: str) -> bool:
        return re.fullmatch(self.regex, value) is not None

    def __str__(self) -> str:
        return f": {self.words}"


def read_strict(cls: type[T], content: Any, where: str = "") -> T:
    """An instance of the dataclass ``cls`` from ``content``, which was read from YAML or JSON.

    Args:
        where: the file, or another origin of the content, for messages.

    Raises:
        FieldError: naming each field that is wrong, what it holds, what is allowed, and the nearest known name.
    """
    reader = _Reader(where)
    result = reader.read(cls, content, "")
    if reader.problems:
        more = reader.count - len(reader.problems)
        text = "; ".join(reader.problems) + (f"; and {more} more" if more else "")
        raise FieldError(f"{where}: {text}" if where else text)
    return typing.cast(T, result)


def none_of(value: Any, known: Iterable[str]) -> str:
    """The message for a name that is not ``known``: the known ones, and the most similar."""
    names = sorted(known)
    return f"{show(value)}, must be {_any_of(names)}{_nearest(value, names)}"


def show(value: Any) -> str:
    """A value as text for a message, shortened."""
    try:
        return _repr.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a very large {type(value).__name__}"


class _Reader:
    """Collects all errors; the result of `read` is only valid if there are none."""

    def __init__(self, where: str, values: int = 0) -> None:
        self.where = where
        self.values = values
        self.problems: list[str] = []
        self.count = 0

    def read(self, hint: Any, value: Any, at: str) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise FieldError(f"{self.where}: {at}: more than {MAX_VALUES} values")
        before = self.count
        result = self._convert(hint, value, at)
        if self.count == before and not all(rule.allows(result) for rule in _split(hint)[1]):
            self._refuse(hint, value, at)
        return result

    def _convert(self, hint: Any, value: Any, at: str) -> Any:
        kind, _ = _split(hint)
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, value, at)
        if origin in (typing.Union, types.UnionType):
            return self._union(hint, arguments, value, at)
        if origin is tuple and isinstance(value, list | tuple):
            if arguments[-1] is not ... and len(arguments) != len(value):
                return self._refuse(hint, value, at)
            hints = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
            return tuple(self.read(h, v, f"{at}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
        if origin in (dict, Mapping) and isinstance(value, dict):
            return {
                self.read(arguments[0], k, f"a name in {at}"): self.read(arguments[1], v, _join(at, k))
                for k, v in value.items()
            }
        if origin is Literal and any(value == a and type(value) is type(a) for a in arguments):
            return value
        if kind is float and type(value) in (int, float):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            return number if math.isfinite(number) else self._refuse(hint, value, at)
        if kind is str and isinstance(value, str):
            clean = not any(unicodedata.category(c) in ("Cc", "Cs") for c in value)
            return value if clean else self._refuse(hint, value, at)
        if kind is Path and isinstance(value, str) and value.strip() and value.isprintable():
            return Path(value)
        if kind in (int, bool, type(None)) and type(value) is kind:
            return value
        return self._refuse(hint, value, at)

    def _union(self, hint: Any, options: Sequence[Any], value: Any, at: str) -> Any:
        if value is None and type(None) in options:
            return None
        some = [option for option in options if option is not type(None)]
        if len(some) == 1:
            return self.read(some[0], value, at)
        for option in some:
            trial = _Reader(self.where, self.values)
            result = trial.read(option, value, at)
            self.values = trial.values
            if not trial.problems:
                return result
        return self._refuse(hint, value, at)

    def _dataclass(self, cls: Any, value: Any, at: str) -> Any:
        if not isinstance(value, dict):
            return self._refuse(cls, value, at)
        hints, before = _hints(cls), self.count
        known = {f.name: f for f in dataclasses.fields(cls) if f.init}
        for name in value:
            if name not in known:
                self._add(_unknown, cls, name, known, at)
        for name, field in known.items():
            needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if needed and name not in value:
                self._add(_missing, hints[name], _join(at, name))
        read = {n: self.read(hints[n], v, _join(at, n)) for n, v in value.items() if n in known}
        if self.count > before:
            return None
        try:
            return cls(**read)
        except ValueError as error:
            return self._add(str, f"{at}: {error}" if at else str(error))

    def _refuse(self, hint: Any, value: Any, at: str) -> None:
        self._add(_refusal, hint, value, at)

    def _add(self, describe: Callable[..., str], *arguments: Any) -> None:
        """Only the first few errors are described: there may be as many as values."""
        self.count += 1
        if self.count <= MAX_PROBLEMS:
            self.problems.append(describe(*arguments))


def _missing(hint: Any, at: str) -> str:
    return f"{at} is missing, must be {_describe(hint)}"


def _unknown(cls: Any, name: Any, known: Iterable[str], at: str) -> str:
    moved = cls.MOVED.get(name) if hasattr(cls, "MOVED") else None
    also = moved or f"the fields are {', '.join(known)}{_nearest(name, known)}"
    return f"there is no field {show(name)}{f' in {at}' if at else ''}: {also}"


def _refusal(hint: Any, value: Any, at: str) -> str:
    kind, _ = _split(hint)
    cure = ""
    if known := _names(kind):
        cure = _nearest(value, known)
    elif kind is str and not isinstance(value, str | list | dict) and value is not None:
        cure = " (in quotes: YAML reads yes, no, numbers and dates as such)"
    elif kind in (int, float) and isinstance(value, str) and _is_number(value):
        cure = " (without quotes and, in YAML, with a point before the exponent: 1.0e+3)"
    elif dataclasses.is_dataclass(kind) and isinstance(value, list):
        names = [f.name for f in dataclasses.fields(kind)]
        if len(value) <= len(names):
            entries = (f"{name}: {show(entry)}" for name, entry in zip(names, value, strict=False))
            cure = f": write {{{', '.join(entries)}}}"
    held = "empty" if value is None else show(value)
    return f"{at or 'the content'} is {held}, must be {_describe(hint)}{cure}"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _split(hint: Any) -> tuple[Any, Sequence[Any]]:
    if typing.get_origin(hint) is Annotated:
        kind, *rules = typing.get_args(hint)
        return kind, rules
    return hint, ()


def _describe(hint: Any, plural: bool = False) -> str:
    """A description of the allowed values: "a whole number from 1 to 9", "a list of 3 numbers above 0"."""
    kind, rules = _split(hint)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    limits = "".join(map(str, rules))
    if dataclasses.is_dataclass(kind):
        return f"{'mappings' if plural else 'a mapping'} with {', '.join(f.name for f in dataclasses.fields(kind))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a, plural) for a in arguments if a is not type(None))
    if origin is Literal:
        return _any_of(_names(kind))
    if origin is tuple:
        count = "" if arguments[-1] is ... else f"{len(arguments)} "
        return f"{'lists' if plural else 'a list'} of {count}{_describe(arguments[0], True)}{limits}"
    if origin in (dict, Mapping):
        return f"a mapping from names to {_describe(arguments[1], True)}{limits}"
    one, many = _WORDS.get(kind, ("empty", "empty"))
    return (many if plural else one) + limits


def _any_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


def _names(kind: Any) -> list[str]:
    """The texts that a Literal, alone or in a union, allows."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return [name for option in typing.get_args(kind) for name in _names(_split(option)[0])]
    return list(map(str, typing.get_args(kind))) if typing.get_origin(kind) is Literal else []


def _nearest(name: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) and len(name) < 100 else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def _join(at: str, name: Any) -> str:
    text = name if isinstance(name, str) and re.fullmatch(r"[\w-]{1,60}", name) else show(name)
    return f"{at}.{text}" if at else text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
