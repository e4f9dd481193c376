"""``mlvgm demo``: export the shipped model, serve it, attack drawn road signs, purify them over HTTP."""

import argparse
import json
import time
from pathlib import Path

from deploy.server import PORTS, port_is_taken
from deploy.torchserve import TorchServe


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = verbs.add_parser(
        "demo",
        help="export, serve and attack the shipped road-sign model",
        description="The whole way in a few minutes: export the shipped model, serve it, attack drawn road signs, and "
        "purify them over HTTP. Prints what each sign is read as before and after; writes demo.json and demo.png.",
        epilog="Example: mlvgm demo --build build",
    )
    parser.add_argument("--build", type=Path, default=Path("build"), help="folder for everything (%(default)s)")
    parser.add_argument("--port", type=int, help="of the server, four more after it (default: the next five free ones)")


def run(args: argparse.Namespace) -> int:
    """Run every step. Returns 0 when all of them went through, whatever the signs were read as."""
    from evaluation import demo
    from evaluation.signs import drawn_signs
    from handlers.pipeline import Pipeline
    from mlvgm.load import load_default

    begun = time.monotonic()

    def say(step: str) -> None:
        print(f"[{time.monotonic() - begun:5.1f} s] {step}", flush=True)

    bundle, store = args.build / demo.RECIPE, args.build / "store"
    say(f"Exporting the recipe {demo.RECIPE} to {bundle}")
    if code := _verb("export", "--recipe", demo.RECIPE, "--out", str(bundle)):
        return code
    say("Packing the archive for TorchServe")
    if code := _verb("archive", str(bundle), "--out", str(store)):
        return code
    say("Attacking drawn road signs through the classifier")
    default, signs = load_default(demo.RECIPE), drawn_signs()
    attacked = demo.attack_signs(default, signs)
    server = TorchServe(args.port or _free_port())
    try:
        say(f"Starting TorchServe on port {server.port}")
        server.start([store / f"{demo.RECIPE}.mar"])
        say(f"Asking it about {len(signs)} clean and {len(signs)} attacked signs")
        answers = [demo.ask(server.client(), sign, pixels) for sign, pixels in zip(signs, attacked, strict=True)]
    finally:
        say("Stopping TorchServe")
        server.stop()
    content = demo.summary(default, signs, attacked, answers) | {"seconds": round(time.monotonic() - begun, 1)}
    (args.build / "demo.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with Pipeline.load(bundle) as pipeline:
        purified = demo.purify(pipeline, attacked)
    demo.save_sheet(signs, attacked, answers, purified, args.build / "demo.png")
    print("", *demo.table(default, content["images"]), "", *demo.conclusion(default, content), sep="\n")
    say(f"Done: {args.build / 'demo.json'}, {args.build / 'demo.png'}")
    return 0


def _verb(*words: str) -> int:
    from mlvgm.cli.main import main

    return main(words)


def _free_port(first: int = 8080) -> int:
    """The first of as many free ones in a row as a server takes."""
    for port in range(first, first + 100 * PORTS, PORTS):
        if not any(port_is_taken(port + i) for i in range(PORTS)):
            return port
    return first  # the server will say what is wrong
