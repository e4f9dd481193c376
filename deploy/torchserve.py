"""TorchServe behind nginx."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from datetime import datetime, timedelta, timezone
from pathlib import Path

from deploy.java import find_java
from deploy.server import Server
from deploy.signals import undisturbed

# The key changes when TorchServe starts and when somebody renews it: every change costs the requests of that moment.
KEY_DAYS = 366
RENEW_BEFORE = timedelta(hours=1)


class Back(Server):
    """TorchServe as a child of ours, java run directly: its log is our output, and no launcher can leave it behind."""

    java: "subprocess.Popen[bytes] | None" = None

    @property
    def log(self) -> Path:
        return Path("/dev/stdout")

    def stop(self, timeout: float = 60) -> bool:
        """As `Server.stop`, and the workers of a java that was killed."""
        stopped = super().stop(timeout)
        if self.java:
            kill_group(self.java)
        return stopped

    def ended(self) -> bool:
        return self.java is not None and self.java.poll() is not None

    def renew_if_due(self) -> None:
        """Long before the key expires, or after a jump of the clock."""
        text = json.loads(self.key_file.read_text())["inference"]["expiration time"]
        expires = datetime.fromisoformat(text[:19]).replace(tzinfo=timezone.utc)
        if expires - datetime.now(timezone.utc) < RENEW_BEFORE:
            self.client().renew_key("inference")

    def _prepare(self, models: dict[str, Path]) -> None:
        super()._prepare(models)
        with (self.folder / "config.properties").open("a") as settings:
            settings.write(f"token_expiration_min={KEY_DAYS * 24 * 60}\n")

    def _launch(self, store: Path, models: dict[str, Path], threads: int) -> None:
        from ts import model_server  # type: ignore[import-untyped]

        site = Path(model_server.__file__).parents[1]
        config, temporary = self.folder / "config.properties", self.folder / "tmp"
        command = [str(find_java().home / "bin" / "java"), f"-Dmodel_server_home={site}"]
        command += [f"-Djava.io.tmpdir={temporary}", f"-Dlog4j.configurationFile=file://{self.folder}/log4j2.xml"]
        command += model_server.load_properties(str(config)).get("vmargs", "").split()
        command += ["-cp", f"{site}/ts/frontend/*"]
        command += ["org.pytorch.serve.ModelServer", "--python", sys.executable, "-f", str(config), "-ncs"]
        command += ["-s", str(store.resolve()), "-m", *(f"{name}={path.name}" for name, path in models.items())]
        with undisturbed():
            self.java = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment(threads),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            (temporary / ".model_server.pid").write_text(str(self.java.pid))
        self._lines: deque[str] = deque(maxlen=200)
        threading.Thread(target=self._pass_on, daemon=True).start()

    def _pass_on(self) -> None:
        """What java says goes on to our output; if that is full or closed, java must not wait for it."""
        assert self.java
        assert self.java.stdout
        for line in self.java.stdout:
            self._lines.append(line.decode(errors="replace").rstrip())
            with contextlib.suppress(OSError):
                os.write(1, line)

    def _said(self) -> list[str]:
        return list(self._lines)


def kill_group(leader: "subprocess.Popen[bytes]") -> None:
    """End ``leader`` and every child that it has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader.pid, signal.SIGKILL)
    leader.wait()
