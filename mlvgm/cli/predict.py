"""``mlvgm predict``: ask a running server about image files."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from deploy.errors import CliError
from deploy.server import Server
from handlers.client import Client, Predictor, ServerError
from handlers.grpc_client import GrpcClient


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb's arguments."""
    parser = subparsers.add_parser(
        "predict",
        help="ask a running server about image files",
        description="Send images to the server that mlvgm serve started, and print its answers. Keys are read, and "
        "renewed when they have expired, by itself. Exit code 1 when an image was refused.",
        epilog="Example: mlvgm predict signs/*.png --samples 16 --save-purified purified",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JPEG, PNG, WebP or BMP")
    parser.add_argument("--model", help="which model (default: the only one that is served)")
    parser.add_argument("--port", type=int, default=8080, help="of the server (%(default)s)")
    parser.add_argument("--samples", type=int, help="purified copies that vote (default: the model's)")
    parser.add_argument("--top-k", type=int, help="classes to name (default: 5, or all if fewer)")
    parser.add_argument("--alphas", help="schedule of interpolation weights (default: the model's)")
    parser.add_argument("--seed", type=int, help="choose the noise, where the server allows it")
    parser.add_argument("--grpc", action="store_true", help="ask over gRPC: the third port after --port")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image, one a line")
    parser.add_argument("--save-purified", type=Path, metavar="DIR", help="write the purified images there as PNG")


def run(arguments: argparse.Namespace) -> int:
    """Ask about one file after the other; one that is refused does not stop the rest."""
    if arguments.grpc and arguments.save_purified:
        raise CliError("--save-purified goes over HTTP: gRPC has no place for the figures beside the image")
    server = Server(arguments.port)
    model = arguments.model or _only_model(server)
    if arguments.save_purified:
        _check_names(arguments.files)
        arguments.save_purified.mkdir(parents=True, exist_ok=True)
    client: Predictor = server.client()
    if arguments.grpc:
        client = GrpcClient(f"127.0.0.1:{server.port + 3}", server.client())
    width = max(4, *(len(str(path)) for path in arguments.files))
    if not arguments.json:
        print(f"{'file':{width}}  {'label':30}  {'confidence':>10}  {'agreement':>9}  {'unpurified':34}  flagged")
    refused = 0
    for path in arguments.files:
        try:
            answer = _ask(client, model, path, arguments)
        except (ServerError, OSError) as error:
            if isinstance(error, ServerError) and error.status == 0:
                raise  # no server: no use in going on
            refused += 1
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if arguments.json:
                print(json.dumps({"file": str(path), "error": reason}))
            else:
                print(f"{path}: {reason}", file=sys.stderr)
            continue
        print(json.dumps({"file": str(path), **answer}) if arguments.json else _row(path, width, answer), flush=True)
    return 1 if refused else 0


def _only_model(server: Server) -> str:
    models = server.models
    if not models:
        raise CliError(f"no server of mlvgm serve is running on port {server.port}: start one, or name the --port")
    if len(models) > 1:
        raise CliError(f"the server has {', '.join(models)}: say which with --model")
    return models[0]


def _ask(client: Predictor, model: str, path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    image = path.read_bytes()
    options: dict[str, Any] = {
        "samples": arguments.samples,
        "alphas": arguments.alphas,
        "seed": arguments.seed,
    }
    if not isinstance(client, Client) or not arguments.save_purified:
        return client.predict(image, model, top_k=arguments.top_k, **options)
    purified, answer = client.purify(image, model, **options)
    target = arguments.save_purified / _purified_name(path)
    target.write_bytes(purified)
    return {**answer, "purified": str(target)}


def _purified_name(path: Path) -> str:
    """Unlike the name of any image that is asked about: none of them must be overwritten."""
    return f"{path.stem}.purified.png"


def _check_names(paths: list[Path]) -> None:
    names = [_purified_name(path) for path in paths]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise CliError(f"two of the files would be saved as {twice}: ask about them one after the other")


def _row(path: Path, width: int, answer: dict[str, Any]) -> str:
    before = f"{answer['unpurified']['label']} {answer['unpurified']['confidence']:.0%}"
    row = f"{path!s:{width}}  {answer['label']:30}  {answer['confidence']:10.1%}  {answer['agreement']:9.0%}  "
    row += f"{before:34}  {'yes' if answer['flagged'] else 'no'}"
    for entry in answer.get("top_k", [])[1:]:
        row += f"\n{'':{width}}  {entry['label']:30}  {entry['confidence']:10.1%}  {entry['votes']:4} votes"
    return row
