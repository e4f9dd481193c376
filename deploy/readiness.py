"""Probe whether models answer, and whether a server that does not is busy or hangs; TorchServe's health check does not.

A probe is a prediction for a grey image. Its header marks it, so that it is not counted in the metrics.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import httpx

from deploy.server import Server, grey_png
from handlers.reply import ServerError, refusal
from handlers.torchserve import PROBE_HEADER

PREDICT_EVERY_S = 15.0
LOOK_EVERY_S = 2.0
HANGS_S = 10.0
"""Seconds for which a server may neither answer a probe nor compute before it is not ready."""
COMPUTES_S = 0.05
"""Seconds of CPU time of the workers between two checks that show that they compute."""


def ask(server: Server, model: str, timeout: float) -> None:
    """Send a probe to ``model``.

    Raises:
        ServerError: the server is unreachable, refuses it, or does not answer within ``timeout`` seconds.
    """
    headers = {"Authorization": f"Bearer {server.client().key('inference')}", PROBE_HEADER: "1", "X-Mlvgm-Samples": "1"}
    url = f"{server.url}/predictions/{model}"
    try:  # without TLS, so no certificates are loaded
        response = httpx.post(url, content=grey_png(), headers=headers, timeout=timeout, trust_env=False, verify=False)
    except httpx.HTTPError as error:
        raise ServerError(f"{server.url}: {str(error) or type(error).__name__}") from None
    if response.status_code not in (200, 422):  # or the image looks attacked, to a server that refuses such images
        raise refusal(response.status_code, response.content)


class ProbeResult(NamedTuple):
    """The result of a probe.

    Attributes:
        ready: whether the model answers, or is too busy to answer while its workers compute.
        words: a description for the user.
        hangs: whether there was no answer, or only that the queue is full.
    """

    ready: bool
    words: str
    hangs: bool = False


def check(server: Server, model: str, timeout: float) -> ProbeResult:
    """Probe ``model``."""
    began, seconds = time.monotonic(), server.worker_seconds()
    while True:
        left = began + timeout - time.monotonic()
        try:
            ask(server, model, max(left, 0.1))
            return ProbeResult(True, f"ready: answered after {time.monotonic() - began:.2f} s")
        except ServerError as error:
            # With a full queue the model is ready if its workers compute: to restart it would make the overload worse.
            if error.status != 503 or left <= 0:
                return ProbeResult(False, f"not ready: {error}", error.status in (0, 503))
            if _computes(seconds, server.worker_seconds()) and _has_worker(server, model):
                return ProbeResult(True, "ready, and busy: its queue is full")
        time.sleep(0.2)


def _computes(before: float | None, after: float | None) -> bool:
    """Whether the workers have computed between two checks of their CPU time; True if that is unknown."""
    # A restarted worker begins at 0 again.
    return before is None or after is None or abs(after - before) >= COMPUTES_S


def _has_worker(server: Server, model: str) -> bool:
    try:
        return server.client(5).ready_workers(model) > 0
    except ServerError:
        return False


class Readiness:
    """Checks the models of ``server`` in its own thread.

    A model is ready if it has answered the last probe, sent every `PREDICT_EVERY_S`, and has a worker, checked every
    `LOOK_EVERY_S`. If checks fail for too long, it is not ready.

    Args:
        timeout: seconds that a probe may take; must be longer than the time in the queue of a busy server.
    """

    def __init__(self, server: Server, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._server, self._timeout, self._clock = server, timeout, clock
        self._asked: dict[str, float] = {}  # when each ready model was last probed
        self._until: dict[str, float] = {}  # until when each model counts as ready
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # so that what a former server was found to be is not said of the present one
        self._progress = clock()
        self._seconds: float | None = None

    def start(self) -> None:
        """Check every `LOOK_EVERY_S` from now on, in a thread."""
        threading.Thread(target=self._look_on, daemon=True).start()

    def follow(self, server: Server) -> None:
        """Check the models of another or restarted server from now on, all of which have answered a probe."""
        with self._lock:
            self._server = server
            self._confirm(server.models)

    def stop(self) -> None:
        """Stop checking; no model is ready from now on."""
        self._stopped.set()

    def models(self) -> dict[str, bool]:
        """Whether each model is ready, by name."""
        if self._stopped.is_set() or self.hung_for() > HANGS_S:
            return dict.fromkeys(self._server.models, False)
        now, until = self._clock(), self._until
        return {model: until.get(model, 0.0) > now for model in self._server.models}

    def ready(self) -> bool:
        """Whether there are models, and all of them are ready."""
        models = self.models()
        return bool(models) and all(models.values())

    def hung_for(self) -> float:
        """Seconds for which no model has answered a probe and no worker has computed."""
        seconds = self._server.worker_seconds()
        if _computes(self._seconds, seconds):
            self._seconds, self._progress = seconds, self._clock()
        return self._clock() - self._progress

    def look(self) -> None:
        """Check every model once."""
        server = self._server
        for model in server.models:
            try:
                is_ready = self._is_ready(server, model)
            except Exception:  # such as a file that is being replaced
                is_ready = False
            with self._lock:
                if server is not self._server:
                    return
                if is_ready:
                    self._confirm([model])
                else:
                    self._until.pop(model, None)

    def _is_ready(self, server: Server, model: str) -> bool:
        asked = self._asked.pop(model, None)
        if asked is not None and self._clock() < asked + PREDICT_EVERY_S:
            ready = _has_worker(server, model)
        else:
            asked = self._clock()
            finding = check(server, model, self._timeout)
            ready = finding.ready
            if not finding.hangs:
                self._progress = self._clock()
        if ready:
            self._asked[model] = asked
        return ready

    def _confirm(self, models: list[str]) -> None:
        now = self._clock()
        self._progress = now
        self._until |= dict.fromkeys(models, now + PREDICT_EVERY_S + self._timeout)

    def _look_on(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            self.look()
