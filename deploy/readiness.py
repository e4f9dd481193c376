"""Whether models answer, as files for nginx, which cannot ask: TorchServe's own health check says yes too early.

There is a file of a model's name while it is ready, and `ALL` while every model is: it has answered a prediction, which
is asked for again every `PREDICT_EVERY_S`, and has a worker, which is looked for every `LOOK_EVERY_S`.
"""

import shutil
import threading
import time
from pathlib import Path

from cli.ready import check
from cli.server import Server
from handlers.client import ServerError

ALL = " all"  # no model is called so
PREDICT_EVERY_S = 15.0
LOOK_EVERY_S = 2.0


class Readiness:
    """Looks, in a thread of its own, at the models of ``server``, and keeps the files in ``folder``.

    Args:
        timeout: seconds that an answer may take: longer than requests wait in the queue of a busy server.
    """

    def __init__(self, server: Server, folder: Path, timeout: float) -> None:
        self._server, self._folder, self._timeout = server, folder, timeout
        self._answered: dict[str, float] = {}  # when each ready model was last asked
        self._ended = threading.Event()

    def start(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # what an earlier run believed
        self._folder.mkdir()
        threading.Thread(target=self._look_on, daemon=True).start()

    def stop(self) -> None:
        """From now on no model is ready."""
        self._ended.set()
        shutil.rmtree(self._folder, ignore_errors=True)

    def look(self) -> None:
        """Look at every model once."""
        models = self._server.models
        ready = {model for model in models if self._is_ready(model)}
        wanted = ready | {ALL} if models and ready == set(models) else ready
        for name in {path.name for path in self._folder.iterdir()} - wanted:
            (self._folder / name).unlink(missing_ok=True)
        for name in wanted:
            (self._folder / name).touch()

    def _is_ready(self, model: str) -> bool:
        asked = self._answered.pop(model, None)
        client = self._server.client(self._timeout)
        try:
            if asked is not None and time.monotonic() < asked + PREDICT_EVERY_S:
                ready = client.ready_workers(model) > 0
            else:
                asked = time.monotonic()
                ready = check(client, model)[0]
        except ServerError:
            return False
        if ready:
            self._answered[model] = asked
        return ready

    def _look_on(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            try:
                self.look()
            except OSError:  # the folder is gone: we are being stopped
                return
