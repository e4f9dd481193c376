"""Health and metadata of the Open Inference Protocol, answered without TorchServe.

nginx sends ``/v2`` paths here, through a socket in the state folder. If this process has ended or hangs, the server is
not ready.
"""

import json
import re
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from deploy import api
from deploy.errors import CliError
from deploy.model_archive import ServedModel
from deploy.readiness import Readiness
from deploy.server import Server

_MODEL = re.compile(r"/v2/models/([A-Za-z0-9_.-]+)(?:/versions/([A-Za-z0-9_.-]+))?(/ready)?")
_SOCKET_PATH_LIMIT = 107

Answer = tuple[int, dict[str, Any]]


class Health:
    """Answers on the socket at ``path``."""

    def __init__(self, path: Path, readiness: Readiness, server: Callable[[], Server]) -> None:
        if len(bytes(path)) > _SOCKET_PATH_LIMIT:
            raise CliError(f"{path}: too long a path for a socket: set $MLVGM_STATE to a shorter one")
        self._path, self._readiness, self._server = path, readiness, server

    def start(self) -> None:
        """Answer from now on, in threads of this process."""
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def do_GET(self) -> None:
                status, content = answer(self.path)
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """No log: nginx logs the request already."""

        class SocketServer(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: object) -> None:
                """No log: nginx has closed the connection, and logs that."""

        self._path.unlink(missing_ok=True)  # of a process that was killed; the lock of the folder is ours
        threading.Thread(target=SocketServer(str(self._path), Handler).serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Accept no further connections."""
        self._path.unlink(missing_ok=True)

    def answer(self, path: str) -> Answer:
        """Status and content for a path of the protocol."""
        return protocol_answer(path, self._server().served(), self._readiness.models())


def protocol_answer(path: str, served: Mapping[str, ServedModel], ready: Mapping[str, bool]) -> Answer:
    """Status and content for a path of the protocol, where ``ready`` says whether a model is."""
    if path in ("/v2", "/v2/"):
        info = api.document()["info"]
        return 200, {"name": info["title"], "version": info["version"], "extensions": ["binary_tensor_data"]}
    if path == "/v2/health/live":
        return 200, {"live": True}
    if path == "/v2/health/ready":
        all_ready = bool(ready) and all(ready.values())
        return 200 if all_ready else 503, {"ready": all_ready}
    match = _MODEL.fullmatch(path)
    name, version, asks_ready = match.groups() if match else ("", None, None)
    model = served.get(name)
    if model and version not in (None, model.version):
        model = None
    if asks_ready:
        is_ready = model is not None and ready.get(name, False)
        return 200 if is_ready else 503, {"name": name, "ready": is_ready}
    if model is None or model.metadata is None:
        return 404, {"error": "no such model is served here"}
    return 200, dict(model.metadata)
