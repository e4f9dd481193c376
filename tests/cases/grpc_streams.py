"""TorchServe's gRPC service as `mlvgm serve` starts it: streaming calls must harm nobody but their caller.

    python tests/cases/grpc_streams.py      (from the project's root; needs build/road-signs; about three minutes)

The messages are written here by hand, field by field, so that no generated stubs are needed. A streaming call may be
answered or refused; afterwards the only worker must answer ordinary requests, or readiness must say that it does not.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, os.getcwd())

try:
    import grpc
except ImportError:
    print("not run: needs grpcio", file=sys.stderr)
    sys.exit(2)
from PIL import Image

from deploy.server import free_ports

SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService"
faults = 0


def say(name: str, good: bool, wanted: str, got: object) -> None:
    global faults
    faults += not good
    print(
        f"ok    {name}" if good else f"FAULT {name}: wanted {wanted}, got {' '.join(str(got).split())[:190]}",
        flush=True,
    )


def field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a message."""
    length, size = b"", len(content)
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content


def request(image: bytes, sequence: str = "") -> bytes:
    entry = field(1, b"data") + field(2, image)
    return field(1, b"road-signs") + field(3, entry) + (field(4, sequence.encode()) if sequence else b"")


class Served:
    """`mlvgm serve` with one worker, until the end of the block."""

    def __enter__(self) -> "Served":
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        root = Path(self.folder.name)
        self.port, self.environment = free_ports(5), os.environ | {"MLVGM_STATE": str(root / "s")}
        self.mlvgm("archive", "build/road-signs", "--out", str(root))
        self.mlvgm("serve", "--model-store", str(root), "--port", str(self.port), "--workers", "1", "--detach")
        self.key = json.loads((root / "s" / str(self.port) / "key_file.json").read_text())["inference"]["key"]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port + 3}")
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.mlvgm("serve", "--stop", "--port", str(self.port))
        self.folder.cleanup()

    def mlvgm(self, *words: str) -> int:
        command = [sys.executable, "-m", "mlvgm", *words]
        return subprocess.run(
            command, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=1500
        ).returncode

    def post(self, seconds: float = 10) -> int | str:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "image/png"}
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/predictions/road-signs", PNG, headers)
        try:
            return urllib.request.urlopen(asked, timeout=seconds).status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError as error:
            return type(error).__name__

    def call(self, kind: str, seconds: float = 10) -> str:
        """What the caller of one of the three methods gets: its first answer, or its error."""
        metadata = (("authorization", f"Bearer {self.key}"),)
        try:
            if kind == "Predictions":
                return repr(
                    self.channel.unary_unary(f"{SERVICE}/{kind}")(request(PNG), metadata=metadata, timeout=seconds)[:80]
                )
            if kind == "StreamPredictions":
                answers = self.channel.unary_stream(f"{SERVICE}/{kind}")(
                    request(PNG), metadata=metadata, timeout=seconds
                )
            else:
                asked = iter([request(PNG, "first")])
                answers = self.channel.stream_stream(f"{SERVICE}/{kind}")(asked, metadata=metadata, timeout=seconds)
            return repr(next(iter(answers))[:80])
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"

    def recovers(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.post(5) == 200:
                return True
            time.sleep(1)
        return False


def beside(server: Served, kind: str) -> list[int | str]:
    """One call of ``kind`` while three other clients ask all the time; what these get."""
    found, over = [], threading.Event()

    def ask() -> None:
        while not over.is_set():
            found.append(server.post(30))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    time.sleep(1)
    server.call(kind)
    time.sleep(5)
    over.set()
    for client in clients:
        client.join()
    return found


stream = io.BytesIO()
Image.new("RGB", (32, 32), "red").save(stream, "PNG")
PNG = stream.getvalue()
for kind, calls in (("StreamPredictions", 1), ("StreamPredictions2", 4)):
    with Served() as server:
        got = server.post(), server.call("Predictions")
        say("control: HTTP and Predictions", got[0] == 200 and "label" in got[1], "answers", got)
        answers = []
        for _ in range(calls):
            answers.append(server.call(kind))
            server.recovers(30)
        good = all("label" in answer or answer.startswith("UNIMPLEMENTED") for answer in answers)
        say(f"{kind}: what the caller gets", good, "an answer, or UNIMPLEMENTED", answers[0])
        serves = server.recovers(30)
        say(f"{kind}: an ordinary request within 30 s of {calls}", serves, "200", server.post(5))
        if serves:
            found = beside(server, kind)
            say(
                f"{kind}: other clients meanwhile",
                set(found) == {200},
                "200 for all",
                {each: found.count(each) for each in set(found)},
            )
        threads = [threading.Thread(target=server.post, args=(20,)) for _ in range(80)]
        with contextlib.ExitStack() as stack:
            for thread in threads:
                thread.start()
                stack.callback(thread.join)
            time.sleep(2)
            answered = server.post(15)
            ready = server.mlvgm("ready", "--port", str(server.port), "--timeout", "15") == 0
        still = server.post(5) == 200
        say(
            f"{kind}: mlvgm ready says what is",
            ready == still or answered == 200,
            "ready only where a request is answered",
            f"ready: {ready}, answered: {still}",
        )
sys.exit(1 if faults else 0)
