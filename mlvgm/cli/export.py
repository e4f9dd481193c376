"""Trace every stage of a recipe to ONNX, compare each with the PyTorch reference, write a bundle.

Example: mlvgm export --recipe road-signs --out build/road-signs
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deploy.errors import CliError
from evaluation.progress import clocked
from handlers import fastest
from handlers.manifest import Manifest
from mlvgm.cli.options import Parser, add_models, whole
from mlvgm.recipe import Recipe


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add_models(parser, help="name of a built-in recipe, or a YAML file")
    add("--precision", choices=("fp32", "fp16", "bf16"), help="instead of the recipe's")
    stored = "of large weights in the files, instead of the recipe's: fp16 and bf16 halve the archive"
    add("--weights", choices=("fp32", "fp16", "bf16"), help=f"{stored}; graphs compute as before")
    add("--blur", action="store_true", help="blur the input first, as the paper's blur variant does")
    add("--input-noise", type=float, metavar="L2", help="add noise of this L2 norm to the input")
    add(
        "--engines",
        nargs="+",
        default=[],
        choices=("torch", "tensorrt", "tensorrt-rtx", "torch-tensorrt"),
        help="also write what these runtimes load: all but tensorrt and torch-tensorrt do without a GPU here",
    )
    add("--target", nargs="+", default=[], metavar="CC", help="for tensorrt-rtx: compute capabilities (8.6 8.9 12.0)")
    add("--out", type=Path, help="folder of the bundle (default: build/RECIPE)")
    add(
        "--single-graph",
        type=whole(0, 65_536),
        nargs="?",
        const=0,
        metavar="K",
        help="also write the whole pipeline as one ONNX graph, for other servers, with K samples of each image "
        "(default: as many as the bundle's)",
    )
    add("--images", choices=("uint8", "float32"), default="uint8", help="it takes (%(default)s)")
    add("--bundle", type=Path, help="write the single graph into this bundle, and export nothing")


def run(args: argparse.Namespace) -> int:
    """Export a recipe and what else was asked for, or add a single graph to a bundle; say how exact all of it is."""
    say = clocked()
    if args.bundle:
        if args.recipe or args.out or args.engines or args.purifier or args.classifier:
            raise CliError("--bundle exports nothing: it takes --single-graph and --images alone")
        _add_single_graph(args.bundle, args, say)
        return 0
    if not args.recipe:
        raise CliError("nothing to export: name a recipe with --recipe, or an exported bundle with --bundle")
    changes = {"blur": args.blur or None, "input_noise_l2": args.input_noise}
    changes |= {"precision": args.precision, "weights": args.weights}
    # Before the libraries are imported: a slip in a recipe is told at once.
    recipe = Recipe.read(args.recipe, **{name: value for name, value in changes.items() if value is not None})

    from export.bundle import export_bundle
    from export.models import load_models
    from mlvgm import checkpoint

    for name in args.engines:
        _check_engine(name, args.target)
    out = args.out or Path("build") / recipe.name
    say(f"loading the models of {recipe.name}")
    with checkpoint.mapped():
        purifier, classifier = load_models(recipe, args.purifier, args.classifier)
        manifest = export_bundle(
            recipe,
            purifier,
            classifier,
            out,
            progress=say,
            with_programs=bool({"torch", "torch-tensorrt"} & set(args.engines)),
            keep_engines=bool(set(args.engines) - {"torch"}),
        )
    say(f"wrote {out}: {', '.join(s.name for s in manifest.stages)}")
    for line in _compared(manifest.report):
        say(line)
    for name in args.engines:
        if name != "torch":
            built = _build(name, out, args.target, say).report[name]
            shares = built["half_share"].items()
            halves = ", ".join(f"{stage} {'fp32' if share is None else f'{share:.0%}'}" for stage, share in shares)
            say(f"built engines with {name} {built['version']}; share of fp16: {halves}")
    if args.single_graph is not None:
        _add_single_graph(out, args, say)
    if manifest.runtime == "auto":
        say("measuring which runtime is the fastest here")
        say(f"the runtime here is {fastest.measure(out)}")
    print(f"Next: mlvgm archive {out}")
    return 0


def _compared(reports: Mapping[str, Any]) -> Iterator[str]:
    """What stays in fp32 and why, and how far the stages are from the reference, in words."""
    for stage, reason in reports["parity"].get("fp32_stages", {}).items():
        yield f"{stage} stays in fp32: {reason}"
    for stage, kept in reports["parity"].get("fp32_weights", {}).items():
        for name, reason in kept.items():
            yield f"{stage}: the weight {name} is stored in fp32: {reason}"
    for report in reports.values():
        worst = max(entry["relative_error"] for entry in report["worst"])
        equal = min(entry["equal_labels"] for entry in report["worst"] if entry["equal_labels"] is not None)
        where = f"in {report['precision']} with {report['runtime']}"
        yield f"worst relative error {where}: {worst:.1e}; equal labels: {equal:.0%}"


def _add_single_graph(bundle: Path, args: argparse.Namespace, say: Callable[[str], None]) -> None:
    from export.single_graph import FOLDER, GRAPH, REPORT, add_single_graph

    report = add_single_graph(bundle, args.single_graph or 0, args.images, say).report[REPORT]
    worst = max(entry["relative_error"] for entry in report["worst"])
    say(f"wrote {bundle / FOLDER / GRAPH}: {report['samples']} samples, {worst:.1e} off the pipeline, equal labels")


def _check_engine(name: str, targets: list[str]) -> None:
    """Refuse what cannot be built here, before all is traced."""
    if name == "torch-tensorrt":
        from export.engines import torch_tensorrt

        torch_tensorrt.compiler_here()
    elif name != "torch":
        from export.engines import tensorrt

        tensorrt.targets_of(name, targets)


def _build(name: str, bundle: Path, targets: list[str], say: Callable[[str], None]) -> Manifest:
    if name == "torch-tensorrt":
        from export.engines import torch_tensorrt

        return torch_tensorrt.build_bundle(bundle, progress=say)
    from export.engines import tensorrt

    return tensorrt.build_bundle(bundle, name, targets, progress=say)
