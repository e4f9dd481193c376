"""``mlvgm export``: from a recipe and its weights to a bundle of engines."""

import argparse
import dataclasses
import time
from pathlib import Path


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "export",
        help="export a model to a bundle of engines",
        description="Trace every stage of a recipe to ONNX, compare each with the PyTorch reference, write a bundle.",
        epilog="Example: mlvgm export --recipe road-signs --out build/road-signs",
    )
    parser.add_argument("--recipe", required=True, help="name of a built-in recipe, or a YAML file")
    parser.add_argument("--purifier", type=Path, help="checkpoint of the purifier, where the recipe ships none")
    parser.add_argument("--classifier", type=Path, help="checkpoint or ONNX file of the classifier, likewise")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="instead of the recipe's")
    parser.add_argument("--blur", action="store_true", help="blur the input first, as the paper's blur variant does")
    parser.add_argument("--input-noise", type=float, metavar="L2", help="add noise of this L2 norm to the input")
    parser.add_argument("--engines", choices=("tensorrt", "tensorrt-rtx"), help="also build engines with this library")
    parser.add_argument(
        "--target", nargs="+", default=[], metavar="CC", help="for tensorrt-rtx: compute capabilities (8.6 8.9 12.0)"
    )
    parser.add_argument("--out", type=Path, help="folder of the bundle (default: build/RECIPE)")


def run(args: argparse.Namespace) -> int:
    from export.bundle import export_bundle
    from export.models import load_models
    from export.tensorrt import build_bundle
    from mlvgm.recipe import Recipe

    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begun:5.1f} s] {line}", flush=True)

    recipe = Recipe.read(args.recipe)
    if args.blur:
        recipe = dataclasses.replace(recipe, blur=True)
    if args.input_noise is not None:
        recipe = dataclasses.replace(recipe, input_noise_l2=args.input_noise)
    if args.precision:
        recipe = dataclasses.replace(recipe, precision=args.precision)
    out = args.out or Path("build") / recipe.name
    say(f"loading the models of {recipe.name}")
    purifier, classifier = load_models(recipe, args.purifier, args.classifier)
    manifest = export_bundle(recipe, purifier, classifier, out, progress=say)
    say(f"wrote {out}: {', '.join(s.name for s in manifest.stages)}")
    for stage, reason in manifest.report["parity"].get("fp32_stages", {}).items():
        say(f"{stage} stays in fp32: {reason}")
    for report in manifest.report.values():
        worst = max(entry["relative_error"] for entry in report["worst"])
        say(f"worst relative error in {report['precision']} with {report['runtime']}: {worst:.1e}")
    if args.engines:
        built = build_bundle(out, args.engines, args.target, progress=say)
        shares = built.report[args.engines]["half_share"]
        halves = ", ".join(f"{stage} {'fp32' if share is None else f'{share:.0%}'}" for stage, share in shares.items())
        say(f"built engines with {args.engines} {built.report[args.engines]['version']}; half products: {halves}")
    print(f"Next: mlvgm archive {out}")
    return 0
