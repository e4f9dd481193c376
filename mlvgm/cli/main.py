"""The ``mlvgm`` command: one verb, one module of this package, imported only when it is called for."""

import argparse
import importlib
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Sequence

from handlers.errors import MlvgmError
from handlers.packages import version
from mlvgm.cli.options import add_verb
from mlvgm.files import shown

VERBS = {
    "demo": "export, serve and attack the shipped road-sign model",
    "train": "train a purifier on your own images",
    "export": "export a model to a bundle of engines",
    "verify": "compare a bundle with the PyTorch reference",
    "archive": "pack a bundle for TorchServe, or for other servers",
    "serve": "start TorchServe on loopback with an archive",
    "ready": "check that a running server answers, for probes",
    "playground": "attack pictures and see them purified, on a page",
    "predict": "ask a running server about image files",
    "purify": "purify a folder of images in bulk",
    "certify": "answer with a proven radius",
    "evaluate": "measure a bundle under attack",
    "bench": "measure stages and servers",
    "attack": "attack image files through a classifier",
    "tune": "learn the interpolation weights",
    "doctor": "check what serving needs, and say how to cure what fails",
}
DISTRIBUTION = "mlvgm-serve"
_OWN_PACKAGES = ("mlvgm", "export", "handlers", "deploy", "evaluation", "benchmarks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns its exit code: 0 done, 1 the verb's own "no", 2 for the user to mend, 130 interrupted."""
    _open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(words)
    if not words:
        parser.print_help()
        return 0
    parsed = parser.parse_args(words)
    try:
        code: int = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `mlvgm ... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        if not (cure := _how_to_install(error)):
            raise
        line = cure
    except (MlvgmError, OSError) as error:  # the system's are about files and ports
        line = " ".join(str(error).split()) or type(error).__name__
    print(f"mlvgm {words[0]}: {shown(line)}", file=sys.stderr)
    return 2


def _open_streams() -> None:
    """Have all three standard streams, and print any name: what the encoding of the output lacks is escaped.

    A file that is opened while one of them is closed would take its number, and get what libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 -- for the whole process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, in full for the verb that was called; the others are listed with their summary."""
    parser = argparse.ArgumentParser(
        prog="mlvgm",
        description="Adversarial purification in front of an image classifier.",
        epilog="Example: mlvgm serve, then mlvgm predict sign.png. Each verb has its own --help.",
    )
    installed = version(DISTRIBUTION) or "(not installed)"
    parser.add_argument("--version", action="version", version=f"mlvgm-serve {installed}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        if words and words[0] == verb:
            module = importlib.import_module(f"mlvgm.cli.{verb}")
            add_verb(verbs, verb, summary, module).set_defaults(run=module.run)
        else:
            verbs.add_parser(verb, help=summary)
    return parser


def _how_to_install(error: ModuleNotFoundError) -> str | None:
    """What a verb lacks, and the cure; None where a part of an installed package is missing, which is our own bug."""
    package = error.name
    if not package or "." in package:
        return None
    if package in _OWN_PACKAGES:
        return f"{package} is not in this installation: use a checkout or the wheel"
    try:
        known = [line.partition(";")[0].strip() for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        known = []
    wanted = next((line for line in known if re.split(r"[^\w-]", line)[0] == package), package)
    return f"{package} is not installed: pip install '{wanted}'"
