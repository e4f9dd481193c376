"""Export the shipped model, serve it, attack drawn road signs, and purify them over HTTP.

Prints what each sign is read as before and after; writes demo.json, demo.png and the attacked signs.

Example: mlvgm demo --build build
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from deploy.server import PORTS, free_ports
from deploy.torchserve import TorchServe
from mlvgm.cli.options import Parser


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder for everything (%(default)s)")
    parser.add_argument("--port", type=int, help="of the server, four more after it (default: five free ones)")


def run(args: argparse.Namespace) -> int:
    """Run every step. Returns 0 when all of them went through, whatever the signs were read as."""
    from evaluation import demo
    from evaluation.progress import clocked
    from evaluation.signs import drawn_signs
    from export.archive import build_archive
    from export.bundle import export_bundle
    from handlers.pipeline import Pipeline
    from mlvgm.load import load_default

    began, say = time.monotonic(), clocked()
    bundle, store, attacks = args.build / demo.RECIPE, args.build / "store", args.build / "attacked-signs"
    say(f"Step 1 of 5: export the model to ONNX, and compare every stage with PyTorch ({bundle})")
    default, signs = load_default(demo.RECIPE), drawn_signs()
    export_bundle(default.recipe, default.purifier, default.classifier, bundle, lambda line: say(f"    {line}"))
    say(f"Step 2 of 5: pack an archive for TorchServe ({store})")
    archive = build_archive(bundle, store)
    say(f"Step 3 of 5: attack {len(signs)} drawn road signs through the classifier ({attacks})")
    attacked = demo.attack_signs(default, signs)
    demo.save_attacked(signs, attacked, attacks)
    server = TorchServe(args.port or free_ports(PORTS))
    try:
        say(f"Step 4 of 5: start TorchServe on port {server.port}, and ask it about the clean and the attacked signs")
        server.start([archive])
        answers = [demo.ask(server.client(), sign, pixels) for sign, pixels in zip(signs, attacked, strict=True)]
    finally:
        server.stop()
    say("Step 5 of 5: TorchServe is stopped; draw the picture")
    content = demo.summary(default, signs, attacked, answers) | {"seconds": round(time.monotonic() - began, 1)}
    (args.build / "demo.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with Pipeline.load(bundle) as pipeline:
        purified = demo.purify(pipeline, attacked)
    picture = args.build / "demo.png"
    demo.save_sheet(signs, attacked, answers, purified, picture)
    say("Done")
    print("", *demo.table(default, content["images"]), "", *demo.conclusion(default, content), sep="\n")
    inside = Path(sys.prefix).is_relative_to(Path.cwd())
    here = Path(sys.prefix).relative_to(Path.cwd()) if inside else Path(sys.prefix)
    program = "mlvgm" if shutil.which("mlvgm") else here / "bin" / "mlvgm"
    print(f"""
See the picture: {picture} (numbers: {picture.with_suffix(".json")})

Next:
  {program} serve --model-store {store}   # start this server again; Ctrl-C stops it
  {program} predict {attacks}   # in another terminal: ask it about the attacked signs
Your own classifier or images: docs/own-classifier.md, docs/own-images.md""")
    return 0
