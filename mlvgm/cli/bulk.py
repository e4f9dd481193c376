"""Work on many image files that can be resumed: each becomes a PNG that holds its own answer.

A PNG is written to a temporary file and then renamed, so one that exists is complete, with its answer. However a job
ends, no answer is lost, and none is made twice.
"""

import errno
import functools
import hashlib
import io
import json
import os
import struct
import sys
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.errors import CliError
from evaluation.progress import say, track
from mlvgm.cli.claim import claim
from mlvgm.cli.containers import Member, is_container, members
from mlvgm.files import MAX_BYTES, Complain, named_files, read_file, replacing, shown

Row = dict[str, Any]
"""The result of one file: "file" and "error", or "file", the path of its PNG, and the answer."""

_KEY = "mlvgm"  # of the text in a PNG
_WRITERS = 4  # at once: a disk confirms several files in little more time than one
_HEADER = 33  # bytes of a PNG before which no text may stand
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Bulk:
    """One job.

    Attributes:
        files: images, or folders, tar or Parquet files of them.
        out: folder of the PNGs.
        name: what a PNG is called in a row, such as "purified".
        settings: everything beside the image that its answer depends on. They are stored with each answer, so that
            PNGs which were made with other settings are recognised.
        batch: images that are worked on at once.
        overwrite: work again on what is there already.
        finish: called after the last row, while ``out`` still belongs to this job.
    """

    files: Sequence[Path]
    out: Path
    name: str
    settings: Mapping[str, Any]
    batch: int
    overwrite: bool = False
    finish: Callable[[], object] = lambda: None

    def run(self, work: "Work") -> Iterator[Row]:
        """A row for each file, also for those that an earlier job has done; see `run_ahead`."""
        return self.run_ahead(lambda images: functools.partial(work, images), 1)

    def run_ahead(self, submit: "Submit", ahead: int) -> Iterator[Row]:
        """As `run`, but that ``ahead`` batches are under way at a time.

        Raises:
            CliError: there is no image; ``out`` is taken by another job, or holds PNGs of other settings; it is full.
        """
        rows: list[Row] = []
        pairs = list(_with_targets(self.files, self.out, lambda path, reason: rows.append(_refusal(path, reason))))
        yield from rows
        if not pairs:
            raise CliError("no image among the files")
        with claim(self.out), ThreadPoolExecutor(_WRITERS, "writer") as pool:
            done = {} if self.overwrite else self._done(pairs)
            if done:
                print(f"{len(done)} of {len(pairs)} images are there already", file=sys.stderr)
            yield from self._rows(pairs, done, submit, ahead, pool)
            self.finish()

    def _done(self, pairs: Sequence[tuple["Source", Path]]) -> dict[Path, Row | None]:
        """The answers that are there, by PNG; None for a PNG without one, which no job of this kind has written."""
        done = {target: _read_answer(target) for _, target in pairs if os.path.lexists(target)}
        for target, answer in done.items():
            if answer is not None and answer.get("settings") != self.settings:
                raise CliError(
                    f"{shown(target)} was made with other settings, or from another bundle: choose another --out, "
                    "or --overwrite it"
                )
        return done

    def _rows(
        self,
        pairs: Sequence[tuple["Source", Path]],
        done: Mapping[Path, Row | None],
        submit: "Submit",
        ahead: int,
        pool: ThreadPoolExecutor,
    ) -> Iterator[Row]:
        waiting: list[File] = []
        under_way: deque[tuple[Sequence[File], Callable[[], Sequence[Outcome]]]] = deque()
        for source, target in track(pairs, self.name):
            try:
                str(source).encode()
                data = source.read() if isinstance(source, Member) else read_file(source)
            except UnicodeEncodeError:
                yield _refusal(source, "its name is not UTF-8: rename it")
                continue
            except OSError as error:
                yield _refusal(source, str(error.strerror))
                continue
            if target in done:
                answer = done[target]
                if answer is None or answer["sha256"] != hashlib.sha256(data).hexdigest():
                    yield _refusal(source, f"{shown(target)} is there and not made from it: --overwrite, or move it")
                else:
                    yield self._row(source, target, answer)
                continue
            waiting.append((source, target, data))
            if len(waiting) == self.batch or sum(len(data) for *_, data in waiting) > MAX_BYTES:
                under_way.append((waiting, submit([data for *_, data in waiting])))
                waiting = []
            while len(under_way) >= ahead:
                yield from self._take(*under_way.popleft(), pool)
        if waiting:
            under_way.append((waiting, submit([data for *_, data in waiting])))
        while under_way:
            yield from self._take(*under_way.popleft(), pool)

    def _take(
        self, files: Sequence["File"], outcomes: Callable[[], "Sequence[Outcome]"], pool: ThreadPoolExecutor
    ) -> Iterator[Row]:
        return pool.map(self._store, zip(files, outcomes(), strict=True))

    def _store(self, made: tuple["File", "Outcome"]) -> Row:
        (source, target, data), outcome = made
        if isinstance(outcome, str):
            return _refusal(source, outcome)
        png, answer = outcome
        answer = {**answer, "settings": self.settings, "sha256": hashlib.sha256(data).hexdigest()}
        try:
            with replacing(target) as draft:
                draft.write_bytes(_with_text(png, json.dumps(answer)))
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise CliError(f"{shown(target)}: {error.strerror}; the same command goes on from here") from None
            return _refusal(source, f"{shown(target)}: {error.strerror}")
        return self._row(source, target, answer)

    def _row(self, source: "Source", target: Path, answer: Row) -> Row:
        return {"file": str(source), self.name: str(target), **answer}


Source = Path | Member

File = tuple[Source, Path, bytes]
"""An image, the PNG that it becomes, and its content."""

Outcome = tuple[bytes, Row] | str
"""A PNG and the answer, or what is wrong with the image."""

Work = Callable[[Sequence[bytes]], Sequence[Outcome]]
"""Takes encoded images, and gives the outcome of each."""

Submit = Callable[[Sequence[bytes]], Callable[[], Sequence[Outcome]]]
"""Begins the work on images, and gives the call that waits for it."""


def print_row(row: Row, as_json: bool, text: str) -> None:
    """One line: JSON, or ``text``, or on the error stream what is wrong with the file.

    Raises:
        CliError: standard output takes no more.
    """
    try:
        if "error" in row and not as_json:
            say(f"{row['file']}: {shown(row['error'])}", sys.stderr)
        else:
            say(json.dumps(row) if as_json else text)
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or leaving would fail for the same reason
        raise CliError(f"standard output: {error.strerror}; the same command prints all answers again") from None


def _refusal(path: Source, reason: str) -> Row:
    return {"file": shown(str(path)), "error": reason}


def _with_targets(given: Sequence[Path], out: Path, complain: Complain) -> Iterator[tuple[Source, Path]]:
    """Every image file and the PNG below ``out`` that it becomes; files of a folder keep their places in it.

    sign.jpg becomes sign.png, but sign.jpg.png where there is a sign.webp beside it. What lies below ``out`` itself is
    no input, but for a file that is named.

    Raises:
        CliError: two files would become one, or a file itself would be overwritten.
    """
    names: list[tuple[Source, Path]] = []
    for path in given:
        if is_container(path) and not path.is_dir():
            names += [(member, Path(member.name)) for member in members(path, complain)]
        else:
            names += named_files([path], out, complain)
    sharing = Counter(name.with_suffix(".png") for _, name in names)
    taken: dict[Path, Source] = {}
    for file, name in names:
        alone = name.with_suffix(".png")
        target = out / (alone if sharing[alone] == 1 else name.with_name(f"{name.name}.png"))
        if target in taken:
            raise CliError(
                f"{shown(str(taken[target]))} and {shown(str(file))} would both become {shown(target)}: "
                "take them one after the other, with an --out for each"
            )
        if os.path.realpath(target) == os.path.realpath(str(file)):
            raise CliError(f"{shown(str(file))} would be overwritten: choose another --out")
        taken[target] = file
        yield file, target


def _with_text(png: bytes, text: str) -> bytes:
    chunk = b"tEXt" + _KEY.encode() + b"\0" + text.encode("ascii")
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return png[:_HEADER] + whole + png[_HEADER:]


def _read_answer(png: Path) -> Row | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_file(png)), formats=("PNG",)) as image:
            answer = json.loads(image.info[_KEY])
        return answer if isinstance(answer, dict) and isinstance(answer.get("sha256"), str) else None
    except (OSError, ValueError, KeyError, SyntaxError, RecursionError):
        return None
