"""The bundle manifest ``pipeline.json``: everything the server must know, with the SHA-256 of every file beside it.

A bundle is the folder that ``mlvgm export`` writes: this manifest and one engine file per stage. None is a pickle.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from handlers.errors import MlvgmError
from handlers.score import ScoreThreshold

FORMAT = 1
FILE_NAME = "pipeline.json"
AUTO = "auto"
"""Number of samples: as many as the vote needs (`handlers.vote`)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_NOISE_I = re.compile(r"noise_(\d+)")
_DTYPES = ("float32", "float16", "int64", "int32", "uint8")
T = TypeVar("T")


class BundleError(MlvgmError, ValueError):
    """A bundle cannot be used: missing, corrupt, altered, inconsistent, or of another version."""


@dataclass(frozen=True)
class Tensor:
    """One named input or output of a stage; the axis "B" in ``shape`` is the batch."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Stage:
    """One engine: its file (relative to the bundle), and what it takes and gives.

    Attributes:
        fallback: file of the same stage in fp32, for the images on which the half-precision one overflows; "" for none.
    """

    name: str
    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    fallback: str = ""


@dataclass(frozen=True)
class Samples:
    """Purified samples per image: what is drawn when a request does not say, a number or `AUTO`, and the most."""

    default: int | str
    max: int

    @property
    def typical(self) -> int:
        """Of an ordinary image by default: the vote of "auto" is mostly decided after the first two."""
        return self.default if isinstance(self.default, int) else min(2, self.max)


@dataclass(frozen=True)
class Batch:
    """Rows per engine call that the stages were built for: 1 <= min <= opt <= max.

    Attributes:
        cpu: the most rows that are worth a call on a CPU, from min to max: large maps of more rows outgrow its caches.
            0 stands for max.
    """

    min: int
    opt: int
    max: int
    cpu: int = 0

    def most(self, on_cpu: bool) -> int:
        """Rows that are worth a call there."""
        return self.cpu if on_cpu and self.cpu else self.max


@dataclass(frozen=True)
class Seal:
    """SHA-256 (lower-case hex) and size in bytes of one file."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> "Seal":
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return cls(digest.hexdigest(), path.stat().st_size)


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        image_size: (H, W) of the images that every stage sees.
        noise_shapes: one item's noise for each latent, coarse to fine: (z, h, w) or (512,).
        alphas: schedule name -> the n effective weights a_i in [0, 1], attenuation included.
        default_alphas: the schedule used when a request names none.
        input_noise_l2: norm of the noise that ``encode`` adds to the images; 0 for none.
        classes: class names in the order of the logits.
        stages: in the order they run; the last is ``classify``.
        files: relative path -> seal; filled in by `sealed`.
        score: from which attack score on an image is suspicious; None where ``mlvgm tune --score`` has not set it.
        report: figures of the parity run; free form.
        source: versions and recipe the bundle was made from; free form.
    """

    name: str
    version: str
    family: str
    image_size: tuple[int, int]
    noise_shapes: tuple[tuple[int, ...], ...]
    alphas: dict[str, tuple[float, ...]]
    default_alphas: str
    samples: Samples
    classes: tuple[str, ...]
    batch: Batch
    stages: tuple[Stage, ...]
    input_noise_l2: float = 0.0
    precision: str = "fp32"
    runtime: str = "auto"
    files: dict[str, Seal] = field(default_factory=dict)
    score: ScoreThreshold | None = None
    report: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def n_latents(self) -> int:
        return len(self.noise_shapes)

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """The manifest of a bundle whose every file has been checked against its seal.

        Raises:
            BundleError: naming the first thing that is missing, altered, inconsistent or of another version.
        """
        folder = Path(folder)
        path = folder / FILE_NAME
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BundleError(f"{folder}: no {FILE_NAME} here: not a bundle (mlvgm export writes one)") from None
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: cannot be read: {error}") from None
        try:
            manifest = _manifest(json.loads(text))
            manifest.validate()
        except json.JSONDecodeError as error:
            raise BundleError(f"{path}: not valid JSON (line {error.lineno}): truncated or damaged") from None
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from None
        manifest._check_files(folder)
        return manifest

    def write(self, folder: str | Path) -> "Manifest":
        """Seal every file in ``folder`` and write ``pipeline.json`` there; returns the sealed manifest.

        Raises:
            BundleError: the manifest contradicts itself, or a stage's file is not in the folder.
        """
        folder = Path(folder)
        manifest = self.sealed(folder)
        manifest.validate()
        content = {"format": FORMAT, **dataclasses.asdict(manifest)}
        draft = folder / f"{FILE_NAME}.tmp"
        draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(draft, folder / FILE_NAME)  # a reader never sees half a manifest
        return manifest

    def sealed(self, folder: str | Path) -> "Manifest":
        """This manifest with ``files`` computed from all that ``folder`` holds, but the manifest itself."""
        folder = Path(folder)
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (FILE_NAME, f"{FILE_NAME}.tmp"))
        return dataclasses.replace(self, files={p.relative_to(folder).as_posix(): Seal.of(p) for p in paths})

    def validate(self) -> None:
        """Check that all fields fit each other.

        Raises:
            BundleError: naming the first field that does not.
        """
        n = self.n_latents
        _require(_NAME.fullmatch(self.name) is not None, f"name {self.name!r} must be letters, digits, '.', '_' or '-'")
        _require(_NAME.fullmatch(self.version) is not None, f"version {self.version!r} must be like 1.0")
        _require(len(self.image_size) == 2 and min(self.image_size) > 0, "image_size must be [H, W], both positive")
        _require(n > 0 and all(s and min(s) > 0 for s in self.noise_shapes), "noise_shapes must hold positive sizes")
        for schedule, weights in self.alphas.items():
            _require(len(weights) == n, f"alphas {schedule!r} has {len(weights)} weights for {n} latents")
            _require(all(0 <= a <= 1 for a in weights), f"alphas {schedule!r} has a weight outside 0 to 1")
        _require(self.default_alphas in self.alphas, f"default_alphas {self.default_alphas!r} is not among the alphas")
        _require(
            1 <= self.samples.typical <= self.samples.max and self.samples.default in (AUTO, self.samples.typical),
            f"samples must have 1 <= default <= max, or default {AUTO!r}",
        )
        _require(1 <= self.batch.min <= self.batch.opt <= self.batch.max, "batch must have 1 <= min <= opt <= max")
        _require(
            self.batch.cpu == 0 or self.batch.min <= self.batch.cpu <= self.batch.max,
            "batch must have min <= cpu <= max, or cpu 0",
        )
        _require(math.isfinite(self.input_noise_l2) and self.input_noise_l2 >= 0, "input_noise_l2 must be 0 or more")
        _require(len(self.classes) >= 2 and all(self.classes), "classes must be two or more names")
        _require(len(set(self.classes)) == len(self.classes), "classes has a name twice")
        self._check_stages()

    def _check_stages(self) -> None:
        """Every stage input must be known or come from an earlier stage, with the same type and shape."""
        _require(len({s.name for s in self.stages}) == len(self.stages), "two stages have the same name")
        _require(bool(self.stages) and self.stages[-1].name == "classify", "the last stage must be classify")
        images = Tensor("images", "float32", ("B", 3, *self.image_size))
        logits = Tensor("logits", "float32", ("B", len(self.classes)))
        known = {"images": images}
        for stage in self.stages:
            for file in (stage.file, stage.fallback or stage.file):
                _require(file in self.files, f"stage {stage.name}: its file {file!r} is not among the files")
            for given in stage.inputs:
                wanted = known.get(given.name) or self._provided(given.name)
                _require(wanted is not None, f"stage {stage.name}: nothing provides its input {given.name!r}")
                _require(given == wanted, f"stage {stage.name}: input {_show(given)} should be {_show(wanted)}")
            known.update({output.name: output for output in stage.outputs})
        classify = self.stages[-1]
        _require(classify.inputs == (images,), "stage classify: its one input must be the images")
        _require(classify.outputs == (logits,), f"stage classify: its one output must be {_show(logits)}")
        _require(known["images"] == images, f"the purified images {_show(known['images'])} should be {_show(images)}")
        noisy = any(t.name == "input_noise" for s in self.stages for t in s.inputs)
        _require(
            noisy == (self.input_noise_l2 > 0), "input_noise_l2 and the stages disagree on whether input noise is on"
        )

    def _provided(self, name: str) -> Tensor | None:
        """What the pipeline itself feeds under ``name``; None when it knows no such input."""
        if name == "alphas":
            return Tensor(name, "float32", (self.n_latents,))
        if name == "input_noise":
            return Tensor(name, "float32", ("B", 3, *self.image_size))
        if name == "noise" and len(set(self.noise_shapes)) == 1:
            return Tensor(name, "float32", ("B", self.n_latents, *self.noise_shapes[0]))
        match = _NOISE_I.fullmatch(name)
        if match and int(match[1]) < self.n_latents:
            return Tensor(name, "float32", ("B", *self.noise_shapes[int(match[1])]))
        return None

    def _check_files(self, folder: Path) -> None:
        for name, seal in self.files.items():
            path = folder / name
            if _escapes(name) or not path.resolve().is_relative_to(folder.resolve()):
                raise BundleError(f"{folder / FILE_NAME}: file {name!r} lies outside the bundle")
            if not path.is_file():
                raise BundleError(f"{path}: missing from the bundle")
            if (size := path.stat().st_size) != seal.bytes:
                raise BundleError(f"{path}: {size} bytes, sealed with {seal.bytes}: truncated or altered")
            if Seal.of(path) != seal:
                raise BundleError(f"{path}: its SHA-256 differs from the sealed one: damaged or altered")


def _escapes(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or ":" in name


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(message)


def _show(tensor: Tensor | None) -> str:
    return f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" if tensor else "absent"


# From parsed JSON to the dataclasses. Each reader takes a value and where it stands, and says what is wrong there.


def _manifest(content: Any) -> Manifest:
    entries = {"score": None, **_dict(content, "manifest")}
    version = entries.get("format")
    if type(version) is not int or version != FORMAT:
        raise BundleError(
            f"format {version!r} is not the format {FORMAT} that this version of mlvgm reads: export again"
        )
    known = {f.name for f in dataclasses.fields(Manifest)}
    if unknown := sorted(set(entries) - known - {"format"}):
        raise BundleError(f"unknown field {unknown[0]!r}")
    if missing := sorted(known - set(entries)):
        raise BundleError(f"field {missing[0]!r} is missing")
    return Manifest(
        name=_str(entries["name"], "name"),
        version=_str(entries["version"], "version"),
        family=_str(entries["family"], "family"),
        image_size=_image_size(entries["image_size"]),
        noise_shapes=_list(entries["noise_shapes"], "noise_shapes", lambda v, at: _list(v, at, _int)),
        alphas={
            str(key): _list(value, f"alphas {key!r}", _number)
            for key, value in _dict(entries["alphas"], "alphas").items()
        },
        default_alphas=_str(entries["default_alphas"], "default_alphas"),
        samples=_samples(entries["samples"], "samples"),
        classes=_list(entries["classes"], "classes", _str),
        batch=Batch(*_ints({"cpu": 0, **_dict(entries["batch"], "batch")}, "batch", ("min", "opt", "max", "cpu"))),
        stages=_list(entries["stages"], "stages", _stage),
        input_noise_l2=_number(entries["input_noise_l2"], "input_noise_l2"),
        precision=_str(entries["precision"], "precision"),
        runtime=_str(entries["runtime"], "runtime"),
        files={str(key): _seal(value, f"files {key!r}") for key, value in _dict(entries["files"], "files").items()},
        score=None if entries["score"] is None else _score(entries["score"], "score"),
        report=dict(_dict(entries["report"], "report")),
        source=dict(_dict(entries["source"], "source")),
    )


def _image_size(value: Any) -> tuple[int, int]:
    sizes = _list(value, "image_size", _int)
    _require(len(sizes) == 2, "image_size must be [H, W]")
    return sizes[0], sizes[1]


def _samples(value: Any, at: str) -> Samples:
    default, most = _entries(value, at, ("default", "max"))
    return Samples(default if default == AUTO else _int(default, f"{at}.default"), _int(most, f"{at}.max"))


def _score(value: Any, at: str) -> ScoreThreshold:
    keys = ("threshold", "false_alarms", "low", "high")
    try:
        return ScoreThreshold(
            *(_number(entry, f"{at}.{key}") for key, entry in zip(keys, _entries(value, at, keys), strict=True))
        )
    except BundleError:
        raise
    except ValueError as error:
        raise BundleError(f"{at}: {error}") from None


def _stage(value: Any, at: str) -> Stage:
    fields = ("name", "file", "inputs", "outputs", "fallback")
    name, file, inputs, outputs, fallback = _entries({"fallback": "", **_dict(value, at)}, at, fields)
    return Stage(
        _str(name, f"{at}.name"),
        _str(file, f"{at}.file"),
        _list(inputs, f"{at}.inputs", _tensor),
        _list(outputs, f"{at}.outputs", _tensor),
        _str(fallback, f"{at}.fallback"),
    )


def _tensor(value: Any, at: str) -> Tensor:
    name, dtype, shape = _entries(value, at, ("name", "dtype", "shape"))
    _require(dtype in _DTYPES, f"{at}.dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    return Tensor(
        _str(name, f"{at}.name"), dtype, _list(shape, f"{at}.shape", lambda v, at: "B" if v == "B" else _int(v, at))
    )


def _seal(value: Any, at: str) -> Seal:
    sha256, size = _entries(value, at, ("sha256", "bytes"))
    _require(
        isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256) is not None, f"{at}.sha256 is no SHA-256"
    )
    return Seal(sha256, _int(size, f"{at}.bytes"))


def _entries(value: Any, at: str, keys: tuple[str, ...]) -> list[Any]:
    entries = _dict(value, at)
    _require(set(entries) == set(keys), f"{at} must have the fields {', '.join(keys)} and no other")
    return [entries[key] for key in keys]


def _ints(value: Any, at: str, keys: tuple[str, ...]) -> list[int]:
    return [_int(entry, f"{at}.{key}") for key, entry in zip(keys, _entries(value, at, keys), strict=True)]


def _list(value: Any, at: str, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    _require(isinstance(value, list), f"{at} must be a list")
    return tuple(read(entry, f"{at}[{i}]") for i, entry in enumerate(value))


def _dict(value: Any, at: str) -> Mapping[str, Any]:
    _require(isinstance(value, dict), f"{at} must be a JSON object")
    entries: Mapping[str, Any] = value
    return entries


def _str(value: Any, at: str) -> str:
    _require(isinstance(value, str), f"{at} must be a string")
    return str(value)


def _int(value: Any, at: str) -> int:
    _require(type(value) is int and value >= 0, f"{at} must be a whole number, 0 or more")
    return int(value)


def _number(value: Any, at: str) -> float:
    _require(type(value) in (int, float) and math.isfinite(value), f"{at} must be a number")
    return float(value)
