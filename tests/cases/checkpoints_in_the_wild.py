"""Checkpoints the way training scripts and downloads leave them, through mlvgm.load.load_classifier.

    PYTHONPATH=. python tests/cases/checkpoints_in_the_wild.py

The weights are those of the shipped classifier. A file that has them in an ordinary wrapping is loaded, or refused with
the one thing that is in the way, so that its owner knows what to do.
"""

import argparse
import io
import os
import pathlib
import sys
import tempfile
import warnings
from collections import OrderedDict

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file

from mlvgm.load import load_classifier

SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "model_store/road-signs/classifier.safetensors"
OURS = ("mlvgm", "export", "handlers")  # exceptions of these packages are printed as one line
STATE = load_file(SHIPPED)
EXPECTED = load_classifier("vgg11", SHIPPED, 43).state_dict()
faults = 0


def load(content: object, suffix: str, classes: int = 43, **how: object) -> dict[str, torch.Tensor] | str:
    """The tensors of the loaded classifier, or the words of the error."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / f"own{suffix}"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif suffix == ".safetensors":
            save_file(content, file, **how)
        else:
            torch.save(content, file, **how)
        try:
            return load_classifier("vgg11", file, classes).state_dict()
        except Exception as error:
            clean = type(error).__module__.partition(".")[0] in OURS
            words = str(error).replace(str(file), "FILE")
            return words if clean else f"a traceback: {type(error).__name__}: {words}"


def say(name: str, good: bool, wanted: str, got: object) -> None:
    global faults
    faults += not good
    words = got if isinstance(got, str) else "other tensors"
    print(
        f"ok    {name}" if good else f"FAULT {name}: wanted {wanted}, got {' '.join(words.split())[:190]}", flush=True
    )


def is_loaded(got: object, tolerance: float = 0) -> bool:
    """Whether it is the shipped model, whatever precision the file had."""
    return not isinstance(got, str) and all((got[k] - v).abs().max() <= tolerance for k, v in EXPECTED.items())


def loaded(name: str, content: object, suffix: str = ".pt", tolerance: float = 0, **how: object) -> None:
    got = load(content, suffix, **how)
    say(name, is_loaded(got, tolerance), "the classifier", got)


def loaded_or_named(name: str, content: object, *words: str, suffix: str = ".pt", **how: object) -> None:
    """The classifier, or one line with all of ``words``."""
    got = load(content, suffix, **how)
    named = (
        isinstance(got, str)
        and not got.startswith("a traceback")
        and all(word.lower() in got.lower() for word in words)
    )
    say(name, is_loaded(got) or named, f"the classifier, or one line that says {' and '.join(words)}", got)


def refused(name: str, content: object, *words: str, suffix: str = ".pt", **how: object) -> None:
    got = load(content, suffix, **how)
    good = (
        isinstance(got, str)
        and not got.startswith("a traceback")
        and any(word.lower() in got.lower() for word in words)
    )
    say(name, good, f"one line that says {' or '.join(words)}", got)


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


class Boom:
    def __reduce__(self):
        return os.mkdir, ("own_code_was_run",)


wrapped = {"state_dict": STATE}
loaded("control: state_dict beside other plain values", wrapped | {"epoch": 3, "loss": 0.1})
loaded("control: an OrderedDict within", {"state_dict": OrderedDict(STATE)})
loaded("control: the format before torch 1.6", wrapped, _use_new_zipfile_serialization=False)
loaded(
    "control: stored in half precision",
    {"state_dict": {k: v.half() if v.is_floating_point() else v for k, v in STATE.items()}},
    tolerance=2e-2,
)
loaded("control: safetensors without metadata", STATE, ".safetensors")

# Ordinary metadata of a safetensors file is plain text, not JSON.
loaded(
    "safetensors with {'format': 'pt'}, as transformers and timm write it",
    STATE,
    ".safetensors",
    metadata={"format": "pt"},
)
loaded("safetensors with a text as metadata", STATE, ".safetensors", metadata={"title": "my signs, second try"})

# Keys behind the prefix of a wrapper: the prefix is what stands in the way.
loaded_or_named("keys behind 'module.', as DataParallel leaves them", {"state_dict": prefixed("module.")}, "module.")
lightning = {"epoch": 3, "global_step": 9, "pytorch-lightning_version": "2.1.0", "hyper_parameters": {"lr": 0.1}}
loaded_or_named(
    "keys behind one 'model.' more, as a Lightning module leaves them",
    lightning | {"state_dict": prefixed("model.")},
    "model.model.",
)

# Something beside the weights that weights_only does not load: torch names the class, and so should the error.
loaded_or_named(
    "an argparse.Namespace beside the weights", wrapped | {"args": argparse.Namespace(lr=0.1)}, "argparse.Namespace"
)
loaded_or_named("a numpy scalar beside the weights", wrapped | {"best": np.float64(0.9)}, "numpy")
loaded_or_named("a pathlib.Path beside the weights", wrapped | {"data": pathlib.PurePosixPath("data")}, "pathlib")
refused("control: code beside the weights is not run", wrapped | {"x": Boom()}, "pickled code", "never run")
say("control: it was not run", not pathlib.Path("own_code_was_run").exists(), "no trace of it", "its folder")

wrapped_twice = {"state_dict": prefixed("module._orig_mod.")}
loaded("keys behind 'module._orig_mod.', as torch.compile within DataParallel leaves them", wrapped_twice)
inside = {key.replace("model.", "model.module.", 1): value for key, value in STATE.items()}
loaded("keys with 'module.' inside, as DataParallel of a part leaves them", {"state_dict": inside})
compiled = {key.replace("model.", "model._orig_mod.", 1): value for key, value in STATE.items()}
loaded("keys with '_orig_mod.' inside, as torch.compile of a part leaves them", {"state_dict": compiled})
loaded("the tensors alone, as torch.save(model.state_dict()) leaves them", STATE)
loaded("the tensors alone behind 'net.'", prefixed("net."))
loaded("under 'model_state_dict', as PyTorch's tutorials do", {"model_state_dict": STATE, "epoch": 3})
loaded("the tensors alone as safetensors behind 'module.'", prefixed("module."), ".safetensors")
loaded("safetensors by another name", save(STATE), ".pt")
deep = {"notes": "[" * 100_000}
loaded("safetensors with nonsense as metadata", STATE, ".safetensors", metadata=deep)
refused("weights under two names", {"model": STATE, "ema": STATE}, "'model' and 'ema'")
beside = {"state_dict": prefixed("model.") | {"criterion.weight": torch.ones(43)}}
refused("a prefix, and a tensor of something else", beside, "model.model.features")
single, halved = "model.classifier.0.weight", STATE | {}
halved[single] = STATE[single].double() * 1e60
refused("float64 beyond float32", {"state_dict": halved}, "too large", "infinite")
doubled = {key: value.double() if value.is_floating_point() else value for key, value in STATE.items()}
loaded("float64 within float32", {"state_dict": doubled})
warnings.simplefilter("ignore")  # PyTorch's, of what it will drop
quantised = STATE | {single: torch.quantize_per_tensor(STATE[single].float(), 0.1, 0, torch.qint8)}
refused("a quantised tensor", {"state_dict": quantised}, "no ordinary tensor")
eighth = STATE | {single: torch.full_like(STATE[single], torch.nan, dtype=torch.float).to(torch.float8_e4m3fn)}
refused("NaN in eight bits", {"state_dict": eighth}, "nan")
refused("a whole pickled module", {"model": torch.nn.Linear(2, 2)}, "torch.nn.modules.linear.Linear")
script = io.BytesIO()
torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
refused("TorchScript", script.getvalue(), "torchscript")
refused("a number of 5,000 digits as JSON", b"1" * 5000, "truncated", "not a")

# No checkpoint at all
refused("a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "lfs")
refused(
    "a Git LFS pointer as safetensors",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "lfs",
    suffix=".safetensors",
)
refused(
    "a web page in the place of a download", b"<!DOCTYPE html><html><title>Sign in</title></html>", "html", "web page"
)
refused("a server's error as JSON", b'{"error": "Repository not found"}', "json")
refused("a gzip file", b"\x1f\x8b\x08\x00" + bytes(50), "unpack")
refused("a Keras file", b"\x89HDF\r\n\x1a\n" + bytes(50), "hdf5")
refused("a web page as safetensors", b"\n<html>", "html", suffix=".safetensors")
refused("control: an empty file", b"", "truncated", "empty")
refused("control: of another number of classes", wrapped, "43", "shape", classes=10)
refused("control: a list of tensors", [torch.zeros(2)], "dict")
sys.exit(1 if faults else 0)
