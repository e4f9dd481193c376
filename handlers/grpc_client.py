"""A client for TorchServe's gRPC port, with the methods and the errors of `handlers.client.Client`. It needs grpcio.

TorchServe ships no Python stubs, so its three messages are described here. A gRPC answer has neither a status nor
headers of its own: what was refused comes as a body that says so.
"""

import json
from functools import cache
from typing import Any, NamedTuple

from handlers.client import Client, Predictor, ServerError, refusal

_PACKAGE = "org.pytorch.serve.grpc.inference"
_METHOD = f"/{_PACKAGE}.InferenceAPIsService/Predictions"
_MAX_ANSWER = 16_777_216
"""As in deploy/config.properties."""
_STATUSES = {"PERMISSION_DENIED": 403, "RESOURCE_EXHAUSTED": 413, "DEADLINE_EXCEEDED": 504}


class GrpcClient(Predictor):
    """Talks to one TorchServe over gRPC.

    Args:
        address: host and port of gRPC inference; `mlvgm serve` takes the third port after that of HTTP.
        keys: the HTTP client of the same server, which reads and renews its keys; None when it wants none.
        timeout: seconds to wait for an answer.

    Raises:
        ServerError: grpcio is not installed.
    """

    def __init__(self, address: str = "127.0.0.1:8083", keys: Client | None = None, timeout: float = 120) -> None:
        self._keys = keys
        self._timeout = timeout
        self._messages = _messages()
        grpc = _grpc()
        # Straight to the server: a proxy from the environment is for the world outside.
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", _MAX_ANSWER)]
        self._address = address
        self._channel = grpc.insecure_channel(address, options)
        self._call = self._channel.unary_unary(
            _METHOD,
            request_serializer=self._messages.request.SerializeToString,
            response_deserializer=self._messages.response.FromString,
        )

    def __enter__(self) -> "GrpcClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def purify(
        self,
        image: bytes,
        model: str,
        samples: int | None = None,
        alphas: str | None = None,
        seed: int | None = None,
    ) -> bytes:
        """The purified image as PNG; the figures, which HTTP has in a header, do not come over gRPC.

        Raises:
            ServerError: as for `predict`.
        """
        return self._ask(image, model, {"samples": samples, "alphas": alphas, "seed": seed, "return": "purified"})

    def _ask(self, data: bytes, model: str, options: dict[str, Any]) -> bytes:
        fields = {name: str(value).encode() for name, value in options.items() if value is not None}
        request = self._messages.request(model_name=model, input={"data": data, **fields})
        if self._keys is None:
            return self._send(request, None)
        key = self._keys.key("inference")
        try:
            return self._send(request, key)
        except ServerError as error:
            if error.status != _STATUSES["PERMISSION_DENIED"]:
                raise
        if self._keys.key("inference") == key:
            self._keys.renew_key("inference")
        return self._send(request, self._keys.key("inference"))

    def _send(self, request: Any, key: str | None) -> bytes:
        metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        try:
            body: bytes = self._call(request, timeout=self._timeout, metadata=metadata).prediction
        except _grpc().RpcError as error:
            raise self._failure(error.code().name, error.details() or "") from None
        status = _status(body)
        if status >= 400:
            raise refusal(status, body)
        return body

    def _failure(self, code: str, details: str) -> ServerError:
        if code == "UNAVAILABLE" and "connect" in details:
            return ServerError(f"{self._address}: no gRPC server there")
        if code == "CANCELLED":  # what TorchServe does to a request that is too large, without a word
            return ServerError("the server cancelled the request: is it larger than max_request_size?", 413)
        status = 404 if "Model not found" in details else _STATUSES.get(code, 503)
        return ServerError(f"the server answered {code}: {details}", status)


def _status(body: bytes) -> int:
    """The HTTP status that this body would have come with: 200 when at least one image was answered."""
    if not body.startswith(b"{"):
        return 200
    content = json.loads(body)
    statuses = [entry.get("status", 200) for entry in content.get("answers", [content])]
    return 200 if 200 in statuses else max(statuses)


class _Messages(NamedTuple):
    request: Any
    response: Any


def _grpc() -> Any:
    try:
        import grpc
    except ImportError:
        raise ServerError("gRPC needs a package more: pip install 'mlvgm-serve[grpc]'") from None
    return grpc


@cache
def _messages() -> _Messages:
    """The message classes, from their description: names, numbers and types of the fields."""
    _grpc()
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mlvgm/inference.proto", package=_PACKAGE, syntax="proto3")
    request = file.message_type.add(name="PredictionsRequest")
    request.field.add(name="model_name", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    request.field.add(name="model_version", number=2, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry = request.nested_type.add(name="InputEntry", options=descriptor_pb2.MessageOptions(map_entry=True))
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)
    name = f".{_PACKAGE}.PredictionsRequest.InputEntry"
    request.field.add(name="input", number=3, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED, type_name=name)
    response = file.message_type.add(name="PredictionResponse")
    response.field.add(name="prediction", number=1, type=field.TYPE_BYTES, label=field.LABEL_OPTIONAL)

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{each.name}"))
        for each in file.message_type
    ]
    return _Messages(*made)
