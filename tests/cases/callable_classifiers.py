"""Classifiers as Python callables the way people write them: mlvgm.load, export.bundle, and both CPU runtimes.

    PYTHONPATH=. python tests/cases/callable_classifiers.py

The callables stand in a module that is written to a temporary folder and put on the path, as a user would. What is
served must read an image as the module does; what cannot be is refused in one line, before the long work.
"""

import contextlib
import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from export.bundle import export_bundle
from handlers.pipeline import Pipeline
from mlvgm.load import load_callable
from mlvgm.nvae import NVAE, NVAEConfig, NVAEPurifier
from mlvgm.recipe import Batch, ClassifierRecipe, Recipe, Samples

SIDE, CLASSES = 16, 10
OURS = ("mlvgm", "export", "handlers")  # exceptions of these packages are printed as one line
IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
faults = 0
torch.manual_seed(0)
SHAPE = NVAEConfig(SIDE, (1,), 1, 1, 0, channels=2, blocks=1, cells_per_block=1, mixtures=1, expansion=1, kernel=3)
PURIFIER = NVAEPurifier(NVAE(SHAPE)).eval().requires_grad_(False)

MODULE = """
import torch
from torch import nn

MEAN = (0.5, 0.5, 0.5)

def body():
    torch.manual_seed(1)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *head)

class Net(nn.Module):
    def __init__(self, how, inner=None):
        super().__init__()
        self.how, self.body = how, inner or body()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("std", torch.ones(1, 3, 1, 1))

    def forward(self, x):
        return self.how(self, x)

def in_place(net, x):
    x.sub_(0.5).div_(0.5)
    return net.body(x)

def branching(net, x):
    return net.body(1 - x) if x.mean() > 0.5 else net.body(x)

def negative(net, x):
    logits = net.body(x)
    logits[:, 0] = float("nan")
    return logits

def nan(): return Net(negative)
def integers(): return Net(lambda net, x: net.body(x).argmax(1, keepdim=True).expand(-1, 10))
def labels(): return Net(lambda net, x: net.body(x).argmax(1))
def one_row(): return Net(lambda net, x: net.body(x).squeeze())
def fixed_size(): return Net(lambda net, x: net.body(x.view(-1, 3, 224, 224)))
def part_scripted(): return Net(lambda net, x: net.body(x), torch.jit.script(body()))
def ends(): raise SystemExit("no weights")
READY = Net(lambda net, x: net.body(x))
def in_training(): return nn.Sequential(body(), nn.Dropout(0.5)).train()

def plain(): return Net(lambda net, x: net.body((x - 0.5) / 0.5))
def resizes(): return Net(lambda net, x: net.body(nn.functional.interpolate(x, size=(32, 32), mode="bilinear")))
def changes_its_input(): return Net(in_place)
def parallel(): return nn.DataParallel(plain())
def mean_zero(): return Net(lambda net, x: net.body((x - net.mean) / net.std))
def times_one(): return Net(lambda net, x: net.body(x * 1.0))
def softmax(): return Net(lambda net, x: net.body(x).softmax(1))
def scripted(): return torch.jit.script(body())
def branches(): return Net(branching)
def as_dict(): return Net(lambda net, x: {"logits": net.body(x)})
def as_tuple(): return Net(lambda net, x: (net.body(x), x))
def too_few(): return Net(lambda net, x: net.body(x)[:, :7])
def raises(): raise RuntimeError("CUDA is not available")
def needs_argument(classes): return body()
def no_module(): return {"state_dict": body().state_dict()}
"""


def export(reference: str):
    """Folder of the bundle or None, what was said or the error's words, the lines of progress, the module."""
    folder, lines, aside = Path(tempfile.mkdtemp(dir=SCRATCH)), [], io.StringIO()
    small = {"alphas": {"linear": (1.0,) * PURIFIER.n_latents}, "batch": Batch(1, 2, 2), "samples": Samples(2, 2)}
    module = None
    try:
        own = ClassifierRecipe(reference)
        recipe = Recipe("own", "nvae", SIDE, PURIFIER.n_latents, own, tuple("abcdefghij"), **small)
        to_us = contextlib.redirect_stderr(aside), contextlib.redirect_stdout(aside)
        with warnings.catch_warnings(record=True) as warned, to_us[0], to_us[1]:
            module = load_callable(reference)
            manifest = export_bundle(recipe, PURIFIER, module, folder / "bundle", progress=lines.append)
    except Exception as error:
        clean = type(error).__module__.partition(".")[0] in OURS
        return None, f"{'' if clean else 'a traceback: ' + type(error).__name__ + ': '}{error}", lines, module
    said = [*lines, aside.getvalue(), *(str(each.message) for each in warned), str(manifest.report)]
    return folder / "bundle", " ".join(said), lines, module


def say(name: str, good: bool, wanted: str, got: str) -> None:
    global faults
    faults += not good
    print(f"ok    {name}" if good else f"FAULT {name}: wanted {wanted}, got {' '.join(got.split())[:170]}", flush=True)


def served(name: str, function: str, or_said: str = "") -> None:
    """Exported, and read alike by both runtimes; or refused in one line that has ``or_said``."""
    bundle, said, _, module = export(f"own_classifiers:{function}")
    if bundle is None:
        named = bool(or_said) and or_said in said and not said.startswith("a traceback")
        return say(name, named, f"a bundle{f', or a line that says {or_said!r}' if or_said else ''}", said)
    images = torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    with torch.no_grad():
        wanted = module(images.clone()).softmax(1).numpy()
    for runtime in ("onnxruntime", "openvino"):
        try:
            with Pipeline.load(bundle, runtime, threads=1) as pipeline:
                found = pipeline.run(IMAGES, seeds=[1, 2]).unpurified_confidences
        except Exception as error:
            return say(name, False, f"an answer of {runtime}", f"{type(error).__name__}: {error}")
        if np.abs(found - wanted).max() > 5e-3:
            return say(name, False, f"the module's answer of {runtime}", f"{np.abs(found - wanted).max():.3f} off")
    return say(name, True, "", "")


def refused(name: str, reference: str, *words: str) -> None:
    """One line that has one of ``words``, at most one line of progress before it."""
    bundle, said, lines, _ = export(reference)
    good = bundle is None and not said.startswith("a traceback") and any(word in said.lower() for word in words)
    early = len(lines) <= 1
    got = "a bundle" if bundle else said if not good else f"it, after {len(lines)} lines of progress"
    say(name, good and early, f"one line, before the long work, that says {' or '.join(words)}", got)


with tempfile.TemporaryDirectory() as scratch:
    SCRATCH = Path(scratch)
    (SCRATCH / "own_classifiers.py").write_text(MODULE)
    (SCRATCH / "own_faulty.py").write_text("1 / 0")
    (SCRATCH / "own_script.py").write_text("import sys; sys.exit(3)")
    (SCRATCH / "own_needy.py").write_text("import no_such_library")
    os.chdir(scratch)  # which is not on the path: the current folder is searched
    served("control: normalises by itself", "plain")
    served("control: resizes its input", "resizes")
    served("works in place on its input", "changes_its_input", "in place")
    served("control: DataParallel", "parallel")
    served("normalises by mean 0 and std 1", "mean_zero")
    served("begins with a product by 1", "times_one")

    bundle, words, _, _ = export("own_classifiers:softmax")
    told = any(word in words.lower() for word in ("softmax", "probabilit")) and not words.startswith("a traceback")
    wanted = "a warning or an error that says softmax or probabilities"
    say("softmax at its end", told, wanted, words if bundle is None else "a bundle, without a word")

    refused("no such module, as without PYTHONPATH", "no_such_module:build", "no_such_module")
    refused("a package that is not there", "no.such.module:build", "no.such")
    refused("a dot in the place of the colon", "own_classifiers.plain", "own_classifiers:plain")
    refused("a module whose import fails", "own_faulty:build", "zerodivision")
    refused("a module that ends the program", "own_script:build", "systemexit")
    refused("a module that needs one that is not installed", "own_needy:build", "no_such_library")
    refused("no such function", "own_classifiers:missing", "missing")
    refused("a name that is no function", "own_classifiers:MEAN", "mean")
    refused("the callable raises", "own_classifiers:raises", "cuda is not available")
    refused("the callable needs an argument", "own_classifiers:needs_argument", "argument")
    refused("the callable returns a dict of weights", "own_classifiers:no_module", "dict")
    refused("the module is TorchScript", "own_classifiers:scripted", "torchscript", "scriptmodule")
    refused("a part of the module is TorchScript", "own_classifiers:part_scripted", "torchscript")
    refused("the callable ends the program", "own_classifiers:ends", "no weights")
    refused("the module gives NaN", "own_classifiers:nan", "nan")
    refused("the module gives integers", "own_classifiers:integers", "int64")
    refused("the module gives labels", "own_classifiers:labels", "classes")
    refused("the module drops the batch axis of one image", "own_classifiers:one_row", "1 images", "classes")
    refused("the module takes images of another size", "own_classifiers:fixed_size", "shape")
    served("a module in the place of a function", "READY")
    served("control: a module in training", "in_training")
    refused("the module gives a dict", "own_classifiers:as_dict", "dict")
    refused("the module gives a tuple", "own_classifiers:as_tuple", "tuple", "outputs")
    refused("the module gives too few classes", "own_classifiers:too_few", "7", "classes")
    bundle, words, _, _ = export("own_classifiers:branches")
    clean = bundle is None and not words.startswith("a traceback")
    say("control: a branch that depends on the image", clean, "one line", "a bundle" if bundle else words)
sys.exit(1 if faults else 0)
