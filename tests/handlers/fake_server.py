"""A server that answers like TorchServe, and like nginx in front of it where a request has an X-Api-Key."""

import contextlib
import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ANSWER = {
    "label": "stop",
    "confidence": 0.9,
    "agreement": 1.0,
    "flagged": False,
    "unpurified": {"label": "yield", "confidence": 0.5},
}


class FakeServer(ThreadingHTTPServer):
    """A server with TorchServe's rules for keys: both ports in one, a new key kills the old one.

    Attributes:
        asked: path, headers and body of every request.
        callers: the ports that they came from, one a connection.
        first: answers to give before any other: status, headers, body.
    """

    daemon_threads = True

    def __init__(self, key_file: Path) -> None:
        super().__init__(("127.0.0.1", 0), Door)
        self.key_file, self.number = key_file, 0
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.callers: set[int] = set()
        self.first: list[tuple[int, dict[str, str], bytes]] = []
        self.renew("inference")
        self.renew("management")

    def renew(self, kind: str) -> None:
        self.number += 1
        keys = json.loads(self.key_file.read_text()) if self.key_file.exists() else {"API": {"key": "api"}}
        keys[kind] = {"key": f"{kind}-{self.number}", "expiration time": "soon"}
        self.key_file.write_text(json.dumps(keys))
        self.valid = {name: entry["key"] for name, entry in keys.items()}


class Door(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, dict(self.headers), body))
        self.server.callers.add(self.client_address[1])
        if self.server.first:
            return self.give(*self.server.first.pop(0))
        if key := self.headers["X-Api-Key"]:
            return self.nginx(key, body)
        kind = "API" if self.path.startswith("/token") else "management" if "models" in self.path else "inference"
        if self.headers["Authorization"] != f"Bearer {self.server.valid[kind]}":
            return self.say(400, {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."})
        if kind == "API":
            self.server.renew(self.path.partition("type=")[2])
            return self.say(200, {})
        if body == b"bad":
            return self.say(400, {"error": "truncated"})
        if kind == "management":
            return self.say(200, [{"workers": [{"status": "READY"}, {"status": "UNLOADING"}]}])  # type: ignore[arg-type]
        return self.say(200, {"label": "stop"})

    do_GET = do_PUT = do_POST

    def nginx(self, key: str, body: bytes) -> None:
        if key != "secret":
            return self.say(401, {"error": "X-Api-Key is missing or unknown"})
        if body == b"bad":
            return self.say(400, {"error": "truncated"})
        return self.say(200, ANSWER | {"answers": [{"label": "stop"}] * 2})

    def say(self, status: int, content: dict[str, Any]) -> None:
        self.give(status, {"X-Mlvgm-Answer": json.dumps(ANSWER)}, json.dumps(content).encode())

    def give(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FakeServer]:
    with FakeServer(folder / "key_file.json") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextlib.contextmanager
def serving_https(folder: Path) -> Iterator[tuple[FakeServer, Path]]:
    """The server with a certificate that nobody signed, and the file of that certificate."""
    key, certificate = folder / "tls.key", folder / "tls.crt"
    words = [
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    words += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with FakeServer(folder / "key_file.json") as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server, certificate
        server.shutdown()
