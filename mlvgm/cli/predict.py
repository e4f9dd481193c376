"""Send images to a server and print its answers.

Of a server that mlvgm serve started here, keys are read, and renewed when they have expired. Exit code 1 when an image
was refused.

Example: mlvgm predict signs/ --samples 16 --save-purified purified. Elsewhere: mlvgm predict sign.png --url
https://host:8443 --api-key-file key.txt --ca-file ca.pem --model road-signs
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.errors import CliError
from deploy.server import Server
from handlers.client import Client
from handlers.reply import ServerError
from mlvgm.cli.bulk import Row, print_row
from mlvgm.cli.options import Parser, add_files, add_port, add_request, add_rows, request
from mlvgm.files import named_files, read_file, shown

_HOPELESS = (0, 401, 404)
"""Unreachable, no key, no such model: the next image would fail in the same way."""


def add_options(parser: Parser) -> None:
    """Declare the arguments."""
    add_files(parser)
    add_server(parser)
    add_request(parser, "the model's")
    parser.add_argument("--top-k", type=int, help="classes to name (default: 5, or all if fewer)")
    parser.add_argument("--seed", type=int, help="choose the noise, where the server allows it")
    add_rows(parser)
    parser.add_argument("--save-purified", type=Path, metavar="DIR", help="write the purified images there as PNG")


def add_server(parser: argparse.ArgumentParser) -> None:
    """--model, --port or --url, --api-key-file and --ca-file, for `find_server`."""
    parser.add_argument("--model", help="which model (default: the only one that mlvgm serve serves)")
    where = parser.add_mutually_exclusive_group()
    add_port(where, "of mlvgm serve on this machine")
    where.add_argument("--url", help="of a server elsewhere: https://HOST:PORT")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the X-Api-Key for --url")
    parser.add_argument("--ca-file", type=Path, metavar="FILE", help="authorities that --url's certificate may be from")


def run(args: argparse.Namespace) -> int:
    """Ask about one file after the other; one that is refused does not stop the rest."""
    files = _with_targets(args.files, args.save_purified)
    client, model = find_server(args)
    width = max(4, *(len(shown(path)) for path, _ in files))
    if not args.json:
        print(f"{'file':{width}}  {'label':30}  {'confidence':>10}  {'agreement':>9}  {'unpurified':34}  flagged")
    refused = 0
    for path, target in files:
        text = ""
        try:
            row = {"file": str(path), **_ask(client, model, path, target, args)}
            if not args.json:
                text = _text(row, width)
        except (ServerError, OSError) as error:
            if isinstance(error, ServerError) and error.status in _HOPELESS:
                raise
            refused += 1
            row = {"file": shown(path), "error": error.strerror if isinstance(error, OSError) else str(error)}
        print_row(row, args.json, text)
    return 1 if refused else 0


def find_server(args: argparse.Namespace) -> tuple[Client, str]:
    """The client, and the name of the model."""
    key_file = args.api_key_file
    if args.url:
        if not args.model:
            raise CliError("say which model with --model: a server elsewhere does not tell what it has")
        key = read_file(key_file).decode("ascii", errors="replace").strip() if key_file else None
        return Client(args.url, api_key=key, ca_file=args.ca_file), args.model
    if key_file or args.ca_file:
        raise CliError("--api-key-file and --ca-file are for a server elsewhere: name it with --url")
    server = Server(args.port)
    return server.client(), args.model or _only_model(server)


def _only_model(server: Server) -> str:
    models = server.models
    if not models:
        raise CliError(f"no server of mlvgm serve is running on port {server.port}: start one, or name --port or --url")
    if len(models) > 1:
        raise CliError(f"the server has {', '.join(models)}: say which with --model")
    return models[0]


def _ask(client: Client, model: str, path: Path, target: Path | None, args: argparse.Namespace) -> dict[str, Any]:
    image = read_file(path)
    if target is None:
        return client.predict(image, model, **request(args))
    purified, answer = client.purify(image, model, **request(args))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(purified)
    return {**answer, "purified": str(target)}


def _with_targets(given: Sequence[Path], folder: Path | None) -> list[tuple[Path, Path | None]]:
    """Every image file, and where in ``folder`` its purified image goes: under a name that none of them has."""
    names: dict[Path, Path] = {}
    for file, name in named_files(given):
        names.setdefault(file, name)
    if not names:
        raise CliError("no image to ask about")
    if folder is None:
        return [(file, None) for file in names]
    targets = {file: folder / name.with_name(f"{name.stem}.purified.png") for file, name in names.items()}
    (most, count), *_ = Counter(targets.values()).most_common(1)
    if count > 1:
        raise CliError(f"two of the files would be saved as {shown(most)}: ask about them one after the other")
    return list(targets.items())


def _text(row: Row, width: int) -> str:
    """Lines of a table.

    Raises:
        ServerError: the answer is not of this server.
    """
    try:
        before = f"{shown(row['unpurified']['label'])} {row['unpurified']['confidence']:.0%}"
        text = f"{shown(row['file']):{width}}  {shown(row['label']):30}  {row['confidence']:10.1%}  "
        text += f"{row['agreement']:9.0%}  {before:34}  {'yes' if row['flagged'] else 'no'}"
        for entry in row.get("top_k", [])[1:]:
            text += f"\n{'':{width}}  {shown(entry['label']):30}  {entry['confidence']:10.1%}  {entry['votes']:4} votes"
    except (KeyError, TypeError, ValueError):
        raise ServerError("an answer that is not of this server") from None
    return text
