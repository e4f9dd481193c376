"""Whether models answer, as files for nginx, which cannot ask: TorchServe's own health check says yes too early.

There is a file of a model's name while it is ready, and `ALL` while every model is: it has answered a prediction, which
is asked for again every `PREDICT_EVERY_S`, and has a worker, which is looked for every `LOOK_EVERY_S`.
"""

import logging
import shutil
import threading
import time
from pathlib import Path

from deploy.server import Server, grey_png
from handlers.client import Client, ServerError

ALL = " all"  # no model is called so
PREDICT_EVERY_S = 15.0
LOOK_EVERY_S = 2.0

logger = logging.getLogger(__name__)


def check(client: Client, model: str) -> tuple[bool, str]:
    """Whether ``model`` answers, or is too busy to while a worker of it is up; and that in words."""
    try:
        answer = client.predict(grey_png(), model, samples=1)
    except ServerError as error:
        if error.status == 503 and _has_worker(client, model):
            # The worker has passed its self-test, or it would not be up. A probe that fails under load makes more load.
            return True, "ready, and busy: its queue is full"
        return False, f"not ready: {error}"
    return True, f"ready: {sum(answer['timing_ms'].values()):.0f} ms"


def _has_worker(client: Client, model: str) -> bool:
    try:
        return client.ready_workers(model) > 0
    except ServerError:
        return False


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

    def follow(self, server: Server) -> None:
        """From now on look at the models of another server, which has answered."""
        self._server = server

    def stop(self) -> None:
        """From now on no model is ready."""
        self._ended.set()
        shutil.rmtree(self._folder, ignore_errors=True)

    def look(self) -> None:
        """Look at every model once."""
        server = self._server
        models = server.models
        ready = {model for model in models if self._is_ready(server, model)}
        if server is self._server:
            self._show(ready | {ALL} if models and ready == set(models) else ready)

    def _is_ready(self, server: Server, model: str) -> bool:
        asked = self._answered.pop(model, None)
        client = server.client(self._timeout)
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

    def _show(self, names: set[str]) -> None:
        for name in {path.name for path in self._folder.iterdir()} - names:
            (self._folder / name).unlink(missing_ok=True)
        for name in names:
            (self._folder / name).touch()

    def _look_on(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            try:
                self.look()
            except Exception:
                if not self._ended.is_set():
                    logger.exception("no model counts as ready")
                    shutil.rmtree(self._folder, ignore_errors=True)
                    self._folder.mkdir(exist_ok=True)
