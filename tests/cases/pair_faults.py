"""TorchServe and nginx as deploy.pair runs them, when what is around them goes wrong.

    python tests/cases/pair_faults.py      (from the project's root; needs nginx, openssl and build/road-signs;
                                                about two minutes; Linux)

Everything is started by the project's own commands, on free ports of 127.0.0.1, and ended here whatever happens.
"""

import contextlib
import fcntl
import http.client
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from PIL import Image

TRUSTING = ssl._create_unverified_context()
faults = 0


def say(name: str, good: bool, wanted: str, got: object) -> None:
    global faults
    faults += not good
    print(
        f"ok    {name}" if good else f"FAULT {name}: wanted {wanted}, got {' '.join(str(got).split())[:190]}",
        flush=True,
    )


class Pair:
    """The two commands that deploy.trial prints, and the processes that come of them."""

    def __init__(self, folder: Path, store: Path) -> None:
        said = subprocess.run(
            [sys.executable, "-m", "deploy.trial", str(folder)], check=True, capture_output=True, text=True
        ).stdout
        self.conf = re.search(r"--nginx-conf (\S+)", said)[1]
        self.back = int(re.search(r"--port (\d+)", said)[1])
        self.key, self.port = re.search(r"X-Api-Key: (\w+)", said)[1], int(re.search(r"localhost:(\d+)", said)[1])
        self.state, self.store, self.folder = folder / "state", store, folder
        self.family: set[psutil.Process] = set()

    def run(self, output: object) -> "subprocess.Popen[bytes]":
        words = [
            "--nginx-conf",
            self.conf,
            "--port",
            str(self.back),
            "--model-store",
            str(self.store),
            "--workers",
            "1",
        ]
        environment = os.environ | {"MLVGM_STATE": str(self.state)}
        return subprocess.Popen(
            [sys.executable, "-m", "deploy.pair", *words], stdout=output, stderr=output, env=environment
        )

    def start(self, output: object = None, seconds: float = 180) -> bool:
        """Whether it comes up."""
        with (self.folder / "log").open("ab") as log:
            self.process = self.run(output or log)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.ask("GET", "/v2/health/ready")[0] == 200 and self.has("nginx", "java"):
                self.remember()
                return True
            time.sleep(0.5)
        return False

    def ask(self, method: str = "POST", path: str = "/predictions/road-signs", seconds: float = 10) -> tuple[int, str]:
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=seconds, context=TRUSTING)
        try:
            connection.request(method, path, PNG if method == "POST" else None, {"X-Api-Key": self.key})
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        except OSError as error:
            return 0, f"{type(error).__name__}: {error}"
        finally:
            connection.close()

    def remember(self) -> None:
        """The pair, and all that it and those before it have started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.family.add(psutil.Process(self.process.pid))
        for member in list(self.family):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.family |= set(member.children(recursive=True))

    def left(self, seconds: float) -> list[str]:
        """Names of those that are still there after some time."""
        alive = psutil.wait_procs(self.family, seconds)[1]
        return sorted(p.name() for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE)

    def child(self, name: str) -> psutil.Process:
        return next(p for p in psutil.Process(self.process.pid).children() if name in p.name())

    def has(self, *names: str) -> bool:
        """Whether it has such children of its own: what answers may be those of an earlier run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = [p.name() for p in psutil.Process(self.process.pid).children()]
            return all(any(name in child for child in children) for name in names)
        return False

    def end(self) -> None:
        self.remember()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        self.remember()
        for member in sorted(self.family, key=lambda p: p.create_time()):  # a master before its workers
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.kill()
        self.process.wait()
        psutil.wait_procs(self.family, 10)
        self.family.clear()


def second_and_paths(pair: Pair) -> None:
    up = pair.start()
    say("control: the pair comes up", up, "readiness", pair.ask("GET", "/v2/health/ready"))
    status, text = pair.ask()
    say("control: a prediction", status == 200 and "label" in text, "200", (status, text))
    # nginx matches the path that it has resolved; what it sends on must be that one.
    for path in (
        "/ping/../predictions/road-signs",
        "/ping/%2e%2e/predictions/road-signs",
        "/models/../predictions/road-signs",
    ):
        status, text = pair.ask(path=path)
        good = 400 <= status < 500 or (status == 200 and "label" in text)
        say(f"the path {path}", good, "a prediction, or a refusal", (status, text))
    status, text = pair.ask("GET", "/ping")
    say("control: the path /ping", status == 404, "404", (status, text))

    with (pair.folder / "second").open("wb") as log:
        second = pair.run(log)
    with contextlib.suppress(subprocess.TimeoutExpired):
        second.wait(60)
    refused, said = second.poll() == 1, (pair.folder / "second").read_text()
    say("control: a second pair on its ports is refused", refused and "already" in said, "exit code 1", said)
    second.kill()
    second.wait()
    time.sleep(3)
    got = pair.ask()
    say(
        "the first pair goes on",
        got[0] == 200 and pair.process.poll() is None,
        "a prediction",
        (got, pair.process.poll()),
    )


def stalled_reader(pair: Pair) -> None:
    """Its output goes to a pipe that is read until it is up and then no more: a pager, a log driver that hangs."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 16_384)
    stalled = threading.Event()

    def read() -> None:
        while not stalled.is_set() and os.read(reading, 4096):
            pass

    threading.Thread(target=read, daemon=True).start()
    up = pair.start(writing)
    stalled.set()
    answers = [pair.ask(seconds=5)[0] for _ in range(3)] if up else []
    for _ in range(150):  # some 300 bytes a line
        status = pair.ask("GET", "/v2/health/ready", seconds=5)[0]
        if status != 200:
            break
    say("nobody reads its output: readiness", status == 200, "200 for 150 requests", (up, answers, status))
    got = pair.ask(seconds=20)
    say("nobody reads its output: a prediction", got[0] == 200, "200", got)
    os.close(reading)
    os.close(writing)


def killed(pair: Pair) -> None:
    up = pair.start()
    pair.remember()
    pair.process.kill()
    pair.process.wait()
    left = pair.left(20)
    say("SIGKILL of the pair: nothing is left after 20 s", up and not left, "no process", left)
    again = pair.start(seconds=90)
    say(
        "SIGKILL of the pair: the same command serves again",
        again,
        "readiness within 90 s",
        (pair.folder / "log").read_text()[-150:],
    )


def signal_while_stopping(pair: Pair) -> None:
    """nginx ends by itself, the pair stops TorchServe, and somebody stops the pair meanwhile."""
    assert pair.start()
    size = (pair.folder / "log").stat().st_size
    pair.remember()
    pair.child("nginx").kill()
    log = lambda: (pair.folder / "log").read_bytes()[size:].decode(errors="replace")  # noqa: E731
    deadline = time.monotonic() + 20
    while "ended by itself" not in log() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    pair.process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        pair.process.wait(60)
    left, files = pair.left(5), [path.name for path in pair.state.rglob("key_file.json")]
    good = pair.process.poll() is not None and not left and not files and "Traceback" not in log()
    say("SIGTERM while it stops", good, "its end, no process, no key", (pair.process.poll(), left, files, log()[-100:]))


if not (shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") and shutil.which("openssl")):
    print("not run: needs nginx and openssl", file=sys.stderr)
    sys.exit(2)
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
    root = Path(scratch)
    Image.new("RGB", (32, 32), "red").save(root / "sign.png")
    PNG = (root / "sign.png").read_bytes()
    subprocess.run(
        [sys.executable, "-m", "mlvgm", "archive", "build/road-signs", "--out", str(root / "store")],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for i, case in enumerate((second_and_paths, stalled_reader, killed, signal_while_stopping)):
        pair = Pair(root / str(i), root / "store")
        try:
            case(pair)
        finally:
            pair.end()
sys.exit(1 if faults else 0)
