"""The manifest of a bundle, ``pipeline.json``: what the server needs to know, and the SHA-256 of every other file.

A bundle is the folder that ``mlvgm export`` writes: the manifest and the graphs of the stages. None is a pickle.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from handlers import files
from handlers.errors import MlvgmError
from handlers.fields import Length, Pattern, Range, read_strict, show
from handlers.runtimes import cache
from handlers.score import ScoreThreshold
from handlers.strict_json import without_repeats

FORMAT = 1
FILE_NAME = "pipeline.json"
AUTO: Literal["auto"] = "auto"
"""Number of samples of a request: as many as its vote needs (`handlers.vote`)."""
_NOISE_I = re.compile(r"noise_(\d+)")
_CHECKED = "checked"  # folder of the cache
_LARGE_BYTES = 64_000_000  # whose digest takes longer than starting a process
MAX_BYTES = 64_000_000
"""Largest manifest that is read: the names of 100,000 classes take 3 MB."""

Name = Annotated[str, Pattern(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", "up to 64 letters a-z, digits, '.', '_' or '-'")]
Size = Annotated[int, Range(1, 2**31 - 1)]
Rows = Annotated[int, Range(1, 65536)]
Weight = Annotated[float, Range(0.0, 1.0)]
Stored = Literal["fp32", "fp16", "bf16"]


class BundleError(MlvgmError, ValueError):
    """A bundle cannot be used: missing, corrupt, altered, inconsistent, or of another version."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and type of an input or output of a stage; the axis "B" of ``shape`` is the batch."""

    name: str
    shape: tuple[Size | Literal["B"], ...]
    dtype: Literal["float32", "float16", "int64", "int32", "uint8"] = "float32"

    @property
    def batched(self) -> bool:
        """Whether it has a batch axis: one row per image or sample."""
        return "B" in self.shape

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class StageSpec:
    """A stage: its file, relative to the bundle, and its inputs and outputs.

    Attributes:
        fallback: file of the stage in fp32, for images on which half precision overflows; "" for none.
    """

    name: Name
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fallback: str = ""


@dataclass(frozen=True)
class Samples:
    """Purified samples per image: the default of a request, a number or `AUTO`, and the maximum."""

    default: Rows | Literal["auto"]
    max: Rows

    def __post_init__(self) -> None:
        if not isinstance(self.default, str) and self.default > self.max:
            raise ValueError(f"must have 1 <= default <= max, not {self.default} and {self.max}")

    @property
    def typical(self) -> int:
        """Samples of an ordinary image by default; with "auto", most votes are decided after two."""
        return self.default if isinstance(self.default, int) else min(2, self.max)


@dataclass(frozen=True)
class Batch:
    """Batch sizes of engine calls: 1 <= min <= opt <= max; engines are tuned for opt.

    Attributes:
        cpu: largest batch on a CPU, from min to max; 0 for max. Large feature maps of more rows exceed its caches.
    """

    min: Rows
    opt: Rows
    max: Rows
    cpu: Annotated[int, Range(0, 65536)] = 0

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"must have 1 <= min <= opt <= max, not {self.min}, {self.opt}, {self.max}")
        if self.cpu and not self.min <= self.cpu <= self.max:
            raise ValueError(f"cpu is {self.cpu}, must lie between min and max, or be 0")

    def most(self, on_cpu: bool) -> int:
        """Largest batch of an engine call."""
        return self.cpu if on_cpu and self.cpu else self.max


@dataclass(frozen=True)
class FileDigest:
    """SHA-256 (lower-case hex) and size in bytes of one file."""

    sha256: Annotated[str, Pattern(r"[0-9a-f]{64}", "64 hexadecimal digits")]
    bytes: Annotated[int, Range(0, 2**63 - 1)]

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        return cls(digest.hexdigest(), path.stat().st_size)


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
        image_size: (H, W) of the images.
        noise_shapes: shape of one sample's noise for each latent, coarse to fine: (z, h, w) or (512,).
        alphas: schedule name -> the n effective alphas in [0, 1], attenuation included.
        default_alphas: name of the schedule used when a request names none.
        input_noise_l2: L2 norm of the noise that the first stage adds to each image; 0 for none.
        classes: class names in the order of the logits.
        stages: in the order they run; the last is ``classify``.
        files: relative path -> digest; set by `write`.
        score: threshold of the attack score above which an image is suspicious; None until ``mlvgm tune --score``.
        weights: in what large weights of the graphs are stored; the graphs cast them to fp32.
        report: relative errors of the stages against their references; free form.
        source: recipe and versions that the bundle was made from; free form.
    """

    name: Name
    version: Name
    family: str
    image_size: tuple[Size, Size]
    noise_shapes: Annotated[tuple[Annotated[tuple[Size, ...], Length(1)], ...], Length(1)]
    alphas: dict[str, tuple[Weight, ...]]
    default_alphas: str
    samples: Samples
    classes: Annotated[tuple[Annotated[str, Length(1)], ...], Length(2)]
    batch: Batch
    stages: Annotated[tuple[StageSpec, ...], Length(1)]
    input_noise_l2: Annotated[float, Range(0.0)] = 0.0
    precision: str = "fp32"
    weights: Stored = "fp32"
    runtime: str = "auto"
    files: dict[str, FileDigest] = field(default_factory=dict)
    score: ScoreThreshold | None = None
    report: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def n_latents(self) -> int:
        return len(self.noise_shapes)

    @classmethod
    def read(cls, folder: str | Path) -> "Manifest":
        """Read the manifest of the bundle in ``folder``, and check the digest of every file.

        Raises:
            BundleError: a file is missing, altered or not listed, or the manifest is inconsistent or of another
                version.
        """
        folder = Path(folder)
        path = folder / FILE_NAME
        try:
            manifest = _parse(_read(path))
            manifest._check_files(folder)
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{path}: {error}") from None
        return manifest

    def write(self, folder: str | Path) -> "Manifest":
        """Write ``pipeline.json`` with the digests of all files in ``folder``; returns the manifest with digests.

        Raises:
            BundleError: the manifest is inconsistent, or a stage's file is not in the folder.
        """
        folder = Path(folder)
        digests = {name: FileDigest.of(folder / name) for name in _files_in(folder)}
        content = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(self, files=digests))}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        try:
            manifest = _parse(text)
        except ValueError as error:
            raise BundleError(f"{folder}: {error}") from None
        files.replace(folder / FILE_NAME, text)
        return manifest

    def graph_digest(self, file: str) -> str:
        """SHA-256 of the digests of a listed graph and of its external weights."""
        names = [name for name in (file, f"{file}.data") if name in self.files]
        return hashlib.sha256(b"".join(bytes.fromhex(self.files[name].sha256) for name in names)).hexdigest()

    def _check(self) -> None:
        """Check that the fields are consistent."""
        for schedule, weights in self.alphas.items():
            n = self.n_latents
            _require(len(weights) == n, f"alphas {schedule!r} has {len(weights)} weights for {n} latents")
        _require(self.default_alphas in self.alphas, f"default_alphas {self.default_alphas!r} is not among the alphas")
        _require(len(set(self.classes)) == len(self.classes), "classes has a name twice")
        self._check_stages()

    def _check_stages(self) -> None:
        """Check that the pipeline or an earlier stage provides every stage input, with the same type and shape."""
        _require(len({s.name for s in self.stages}) == len(self.stages), "two stages have the same name")
        _require(bool(self.stages) and self.stages[-1].name == "classify", "the last stage must be classify")
        images = TensorSpec("images", ("B", 3, *self.image_size))
        logits = TensorSpec("logits", ("B", len(self.classes)))
        known = {"images": images}
        for stage in self.stages:
            for file in (stage.file, stage.fallback or stage.file):
                _require(file in self.files, f"stage {stage.name}: its file {file!r} is not among the files")
            for given in stage.inputs:
                wanted = known.get(given.name) or self._provided(given.name)
                _require(wanted is not None, f"stage {stage.name}: nothing provides its input {given.name!r}")
                _require(given == wanted, f"stage {stage.name}: input {given} should be {wanted}")
            known.update({output.name: output for output in stage.outputs})
        classify = self.stages[-1]
        _require(classify.inputs == (images,), "stage classify: its one input must be the images")
        _require(classify.outputs == (logits,), f"stage classify: its one output must be {logits}")
        _require(known["images"] == images, f"the purified images {known['images']} should be {images}")
        noisy = any(t.name == "input_noise" for s in self.stages for t in s.inputs)
        _require(
            noisy == (self.input_noise_l2 > 0), "input_noise_l2 and the stages disagree on whether input noise is on"
        )

    def _provided(self, name: str) -> TensorSpec | None:
        """The tensor that the pipeline itself provides under ``name``, or None."""
        if name == "alphas":
            return TensorSpec(name, (self.n_latents,))
        if name == "input_noise":
            return TensorSpec(name, ("B", 3, *self.image_size))
        if name == "noise" and len(set(self.noise_shapes)) == 1:
            return TensorSpec(name, ("B", self.n_latents, *self.noise_shapes[0]))
        match = _NOISE_I.fullmatch(name)
        if match and int(match[1]) < self.n_latents:
            return TensorSpec(name, ("B", *self.noise_shapes[int(match[1])]))
        return None

    def _check_files(self, folder: Path) -> None:
        """Check that the folder has the listed files, unaltered, and no others: engines load files from it."""
        for name, digest in self.files.items():
            path = folder / name
            if _escapes(name) or not path.resolve().is_relative_to(folder.resolve()):
                raise BundleError(f"file {name!r} lies outside the bundle")
            if not path.is_file():
                raise BundleError(f"{name}: missing from the bundle")
            if (size := path.stat().st_size) != digest.bytes:
                raise BundleError(f"{name}: {size} bytes, {digest.bytes} when it was written: truncated or altered")
            if not _is_unaltered(path, digest):
                raise BundleError(f"{name}: its SHA-256 differs from the one in the manifest: damaged or altered")
        if foreign := sorted(_files_in(folder) - self.files.keys()):
            raise BundleError(f"{foreign[0]}: not a file of this bundle: remove it, or export again")


def _is_unaltered(path: Path, digest: FileDigest) -> bool:
    """Whether a file has this digest. That of a large file is computed once for all processes, until it is changed."""
    if digest.bytes < _LARGE_BYTES:
        return FileDigest.of(path) == digest
    state = {"path": str(path.resolve()), "state": cache.state(path), "is": digest.sha256}
    if cache.read(_CHECKED, state) is not None:
        return True
    if FileDigest.of(path) != digest:
        return False
    cache.write(_CHECKED, state, b"")
    return True


def _files_in(folder: Path) -> set[str]:
    """Relative paths of all files in ``folder``, except the manifest itself."""
    found = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    }
    return found - {FILE_NAME, FILE_NAME + files.DRAFT_SUFFIX}


def _escapes(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or ":" in name


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BundleError(message)


def _read(path: Path) -> str:
    if not path.is_file():
        raise BundleError("there is no such file: not a bundle (mlvgm export writes one)")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise BundleError(f"{size} bytes: not a manifest")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"cannot be read: {error}") from None


def _parse(text: str) -> Manifest:
    """The manifest in a JSON text.

    Raises:
        ValueError: it is not JSON, or a field is wrong or inconsistent with another.
    """
    try:
        content = json.loads(text, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise BundleError(f"not valid JSON (line {error.lineno}): truncated or damaged") from None
    except RecursionError:
        raise BundleError("its lists or objects are nested too deeply") from None
    version = content.pop("format", None) if isinstance(content, dict) else FORMAT
    if type(version) is not int or version != FORMAT:
        raise BundleError(f"format {show(version)} is not {FORMAT}, which this version of mlvgm reads: export again")
    manifest = read_strict(Manifest, content)
    manifest._check()
    return manifest
