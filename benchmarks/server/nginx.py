"""nginx in front of a deployment, as deploy/pair.py puts it there: the shape that faces clients."""

import ssl
import tempfile
import time
from itertools import count
from pathlib import Path

from benchmarks.server.call import Call, prediction
from benchmarks.server.deployment import Deployment
from benchmarks.server.started import Started
from deploy import trial
from deploy.errors import CliError
from deploy.nginx import Nginx as NginxProcess
from deploy.output import Output
from deploy.readiness import Readiness
from deploy.server import free_ports, port_is_taken

_CLIENTS = 256  # so that none of them is over the rate that deploy/nginx.conf lets a client have
_WAIT = 30.0


class Nginx(Started):
    """The `Target` that asks a ``deployment`` through nginx, over TLS."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._folder = tempfile.TemporaryDirectory(prefix="mlvgm-")
        self._keys = [f"client-{i}" for i in range(_CLIENTS)]
        self._sent = count()
        self.address = ("127.0.0.1", free_ports(1))
        self.tls: ssl.SSLContext | None = None
        self._front: NginxProcess | None = None

    def start(self) -> None:
        server, etc = self._deployment.server, Path(self._folder.name) / "etc"
        clients = {key: f"c{i}" for i, key in enumerate(self._keys)}
        conf = trial.write(etc, self.address[1], server.folder.parent, clients, quiet=True)
        self.tls = ssl.create_default_context(cafile=etc / "private" / "tls.crt")
        self._front = NginxProcess(conf, server, Readiness(server, 60), Output(1))
        self._front.start()
        deadline = time.monotonic() + _WAIT
        while not port_is_taken(self.address[1]):
            if self._front.ended() or time.monotonic() > deadline:
                raise CliError("nginx does not start")
            time.sleep(0.05)

    def stop(self) -> None:
        if self._front is not None:
            self._front.drain(timeout=10)
        self._folder.cleanup()

    def request(self, call: Call) -> bytes:
        key = f"X-Api-Key: {self._keys[next(self._sent) % _CLIENTS]}\r\n".encode()
        return prediction(call, self._deployment.model, key)

    def refresh_key(self, request: bytes, body: bytes) -> bool:
        return False
