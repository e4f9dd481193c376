"""A folder to try nginx and TorchServe: deploy/nginx.conf on a free port of loopback, a certificate and keys.

    python -m deploy.trial build/pair

writes it and prints the commands to start the supervisor and to send a request. It needs no root.
"""

import argparse
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.errors import CliError
from deploy.nginx import find_nginx
from deploy.server import PORTS, free_ports

CONF = Path(__file__).with_name("nginx.conf")


def write(folder: Path, port: int, state: Path, clients: Mapping[str, str], quiet: bool = False) -> Path:
    """Write the files of nginx to ``folder``.

    Args:
        port: port of loopback to listen on.
        state: $MLVGM_STATE of the supervisor.
        clients: names by key.
        quiet: whether to log no requests.

    Returns:
        The configuration file.

    Raises:
        CliError: openssl is missing, or cannot make a certificate.
    """
    if shutil.which("openssl") is None:
        raise CliError("openssl is not installed (Debian: apt install openssl)")
    private = folder / "private"
    private.mkdir(parents=True)
    state.mkdir(parents=True, exist_ok=True)
    replaced = {"/run/mlvgm": str(state.absolute()), "listen 8443": f"listen 127.0.0.1:{port}"}
    if quiet:
        replaced |= {"access_log /dev/stdout json": "access_log off", "error_log stderr error": "error_log stderr crit"}
    # Started by root, nginx would run as the user nobody, who may not be able to read the folder.
    user = "user root;\n" if os.geteuid() == 0 else ""
    conf = folder / "nginx.conf"
    conf.write_text(user + replacing(CONF.read_text(), replaced))
    (private / "clients.map").touch(0o600)
    (private / "clients.map").write_text("".join(f'"{key}" {name};\n' for key, name in clients.items()))
    certify(private)
    return conf


def is_possible() -> bool:
    """Whether nginx and openssl are installed."""
    return find_nginx() is not None and shutil.which("openssl") is not None


def certify(private: Path) -> None:
    """Write a new key and self-signed certificate to the folder ``private``."""
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    words += ["-keyout", str(private / "tls.key"), "-out", str(private / "tls.crt")]
    try:
        subprocess.run(["openssl", *words], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise CliError(f"openssl makes no certificate: {error.stderr.strip()}") from None


def replacing(text: str, replaced: Mapping[str, str]) -> str:
    """``text`` with each key of ``replaced``, which must occur, replaced by its value."""
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder, and print the commands to use it."""
    parser = argparse.ArgumentParser(prog="deploy.trial", description="A folder to try the pair with, on loopback.")
    parser.add_argument("folder", type=Path, help="to write, a new one")
    folder = parser.parse_args(arguments).folder.absolute()
    key, port = secrets.token_hex(24), free_ports(1 + 2 * PORTS)
    try:
        # Apart from each other: nginx is reloaded when anything changes beside its configuration.
        conf = write(folder / "etc", port, folder / "state", {key: "me"})
    except FileExistsError:
        print(f"{folder} is there already: choose another one, or remove it", file=sys.stderr)
        return 1
    except (CliError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"""\
Start it, with the archives of model_store (Ctrl-C stops it):
  MLVGM_STATE={folder / "state"} python -m deploy.pair --nginx-conf {conf} --port {port + 1}
Ask it:
  curl --cacert {conf.parent}/private/tls.crt -H "X-Api-Key: {key}" -T sign.png https://localhost:{port}/predictions/MODEL""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
