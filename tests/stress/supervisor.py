"""Stops of the supervisor at random moments, by every signal, with programs in the place of TorchServe and nginx.

    python -m tests.stress.supervisor --stops 10000 --jobs 4

Some of these programs end late or not at all, leave children behind, or flood a log that nobody reads. Each time the
supervisor must be gone within `MOST_SECONDS`, with all that it has started, and what it writes for a server with it.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from deploy import signals, supervisor
from deploy.nginx import Nginx
from deploy.server import PORTS
from deploy.torchserve import TorchServe

MOST_SECONDS = 60.0
"""For a machine that has other work; on a quiet one it takes two."""
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

PROGRAMS = (
    "exec nap 1000",
    "trap 'sleep 0.2; exit 0' TERM QUIT; nap 1000 & wait",
    "trap '' TERM QUIT HUP; nap 1000 & exec nap 1000",
    "head -c 300000 /dev/zero | tr '\\0' 'x'; yes | head -n 20000; exec nap 1000",
    ": nap; sleep 0.1; exit 3",
)


class StubTorchServe(TorchServe):
    """Answers nothing, and counts as having answered after a moment."""

    def _check(self) -> None:
        """There is nothing to be checked."""

    def _command(self, store: Path, models: list[str]) -> list[str]:
        key = {"key": "k", "expiration time": "2099-01-01T00:00:00.0Z"}
        self.key_file.write_text(json.dumps({"inference": key, "management": key, "API": key}))
        return program(self.folder.parent)

    def stop(self, timeout: float = 0.5) -> bool:
        return super().stop(min(timeout, 0.5))

    def _await_answer(self, *_: object) -> None:
        signals.pause(random.random() * 0.1)


class StubNginx(Nginx):
    """Takes no request."""

    def _command(self) -> list[str]:
        return program(self._state)


def program(state: Path) -> list[str]:
    """One of `PROGRAMS`, which can be told by the path of the folder in its command line."""
    return ["/bin/sh", "-c", f"[ $0 != -t ] || exit 0; {random.choice(PROGRAMS).replace('nap', f'{state}/nap')}"]


def run(state: Path, port: int, output: int, seed: int) -> None:
    """The supervisor, as ``python -m deploy.pair`` has it; never returns."""
    random.seed(seed)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    os.environ["MLVGM_STATE"] = str(state)
    os.dup2(output, 1)
    os.dup2(output, 2)
    supervisor.TorchServe, supervisor.Nginx = StubTorchServe, StubNginx  # type: ignore[misc]
    supervisor.LOOK_EVERY_S = 0.05
    words = ["--port", str(port), "--model-store", str(state / "store"), "--nginx-conf", str(state / "etc/nginx.conf")]
    with signals.noted():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*STOPS, signals.UPGRADE))
        signals.leave(supervisor.main([*words, "--models", "m", "--workers", "1", "--drain", "0.5"]))


def stop_once(state: Path, port: int, output: int, seed: int) -> None:
    """Start a supervisor, send it signals at random moments, and see that nothing of it is left.

    Raises:
        AssertionError: something hangs or is left.
    """
    chance = random.Random(seed)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPS, signals.UPGRADE))  # as good as from its first moment
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        try:
            run(state, port, output, seed)
        except BaseException:
            (state / "fault").write_text(traceback.format_exc())
        finally:
            os._exit(70)
    kills = chance.random() < 0.1
    for _ in range(chance.randrange(4)):
        time.sleep(chance.random() * chance.choice((0.02, 0.5, 1.0)))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, chance.choice((*STOPS, signals.UPGRADE, signals.UPGRADE)))
    time.sleep(chance.random() * chance.choice((0.1, 1.0)))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL if kills else chance.choice(STOPS))
    status: list[int] = []
    until(lambda: ended(pid, status), f"seed {seed}: the supervisor hangs")
    code = os.waitstatus_to_exitcode(status[0])
    assert not (state / "fault").exists(), (state / "fault").read_text()
    assert code in (0, 1, -signal.SIGKILL), f"seed {seed}: {code}"
    if not kills:
        until(lambda: not left(state), f"seed {seed}: {left(state)} are left")
        assert not list(state.rglob("key_file.json")), f"seed {seed}: a key is left"
        return
    # The kernel kills TorchServe, and asks nginx to end: these here may be stubborn, or have children.
    for process in left(state):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for key in state.rglob("key_file.json"):
        key.unlink()


def ended(pid: int, status: list[int]) -> bool:
    """Whether this child has ended; its status is then in ``status``."""
    found, state = os.waitpid(pid, os.WNOHANG)
    status += [state] if found else []
    return bool(found)


def left(state: Path) -> list[int]:
    """Process ids of programs that were started for this folder and have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if bytes(state) in (folder / "cmdline").read_bytes():  # which is empty when it has ended
                found.append(int(folder.name))
    return found


def until(holds: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + MOST_SECONDS
    while not holds():
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)


def stop_often(stops: int, seed: int, say: Callable[[str], None] = lambda _: None) -> None:
    """So many of `stop_once`, one after the other, in one folder, with an output that nobody reads."""
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="stops-") as folder:
        state = Path(folder).resolve()
        (state / "nap").symlink_to(shutil.which("sleep") or "/bin/sleep")
        (state / "etc").mkdir()
        (state / "etc" / "nginx.conf").touch()
        (state / "store" / "m" / "MAR-INF").mkdir(parents=True)
        manifest = {"model": {"modelName": "m", "modelVersion": "1"}}
        (state / "store" / "m" / "MAR-INF" / "MANIFEST.json").write_text(json.dumps(manifest))
        for number in range(stops):
            stop_once(state, 20_000 + 2 * PORTS * (seed % 500), writing, seed * 1_000_000 + number)
            if (number + 1) % 100 == 0:
                say(f"{number + 1} stops")
    os.close(reading)
    os.close(writing)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="tests.stress.supervisor", description="Stop the supervisor very often.")
    parser.add_argument("--stops", type=int, default=10_000, help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="side by side (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the first job (%(default)s)")
    options = parser.parse_args()
    children = []
    for job in range(options.jobs):
        if (pid := os.fork()) == 0:
            try:
                share = (options.stops + job) // options.jobs
                stop_often(share, options.seed + job, lambda text, job=job: print(f"job {job}: {text}", flush=True))  # type: ignore[misc]
            except BaseException as error:
                print(f"job {job}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print("all in order" if not any(codes) else "FAULT", flush=True)
    return max(map(abs, codes))


if __name__ == "__main__":
    sys.exit(main())
