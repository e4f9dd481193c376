"""The same pipeline behind LitServe, to compare with: ``python -m benchmarks.server.litserve_app``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-untyped,import-not-found,unused-ignore]
from starlette.responses import Response  # type: ignore[import-not-found,unused-ignore]

from handlers.pipeline import Pipeline
from handlers.service import Service


class PurifierApi(litserve.LitAPI):  # type: ignore[misc,unused-ignore]
    """JSON in, and the very answers that TorchServe's handler gives."""

    def __init__(self, bundle: Path, runtime: str, threads: int, batch: int, delay_s: float) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=delay_s)
        self._load = (bundle, runtime, threads)

    def setup(self, _device: str) -> None:
        self._service = Service(Pipeline.load(*self._load), allow_seed=True)
        self._service.self_test()

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        return request

    def batch(self, inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(inputs)

    def predict(self, requests: list[dict[str, Any]]) -> list[Response]:
        answers = self._service.answer([({"body": request}, {}) for request in requests])
        return [Response(answer.body, answer.status, media_type=answer.content_type) for answer in answers]

    def unbatch(self, output: list[Response]) -> list[Response]:
        return output

    def encode_response(self, output: Response) -> Response:
        return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--delay", type=float, default=0.002, help="seconds")
    given = parser.parse_args()
    api = PurifierApi(given.bundle, given.runtime, given.threads, given.batch, given.delay)
    server = litserve.LitServer(
        api, accelerator="cpu", devices=1, workers_per_device=given.workers, timeout=False, fast_queue=True
    )
    server.run(host="127.0.0.1", port=given.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
