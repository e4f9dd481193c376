"""The Open Inference Protocol (KServe v2): a request as tensors, and its answer as tensors.

One input tensor holds the images: "BYTES", each an encoded image in base64, or their pixels as "UINT8" (0 to 255) or
"FP32" (0 to 1, rounded to 8 bits) of shape (n, H, W, 3) or (n, 3, H, W). Options go under "parameters". Tensor data may
follow the JSON as raw bytes, as the binary data extension has it. Every output has n rows; an answer holds all of them
or those that "outputs" names.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from handlers.arrays import Pixels
from handlers.manifest import AUTO, Manifest
from handlers.strict_json import RequestError, base64_bytes, given, quoted

JSON_LENGTH_HEADER = "inference-header-content-length"
"""Header with the number of bytes of the body that are JSON; tensors follow."""

_ENTRIES = ("id", "inputs", "outputs", "parameters", "model_name", "model_version")
"""Entries that SDKs repeat in the body, and that are ignored: the path names the model."""
_HINTS = ("binary_data_output", "content_type", "priority", "timeout", "sequence_id", "sequence_start", "sequence_end")
"""Parameters that SDKs add, and that are ignored. Answers are always JSON: tensors as small as these gain nothing from
another form."""
_MAX_SIDE, _MAX_DIMENSIONS = 20_000, 8
_PIXELS: dict[str, tuple[np.dtype[Any], int]] = {"UINT8": (np.dtype("u1"), 255), "FP32": (np.dtype("<f4"), 1)}
"""Type of the tensor, and the value of white."""

_PLAIN = {
    "label": "BYTES",
    "index": "INT64",
    "confidence": "FP32",
    "agreement": "FP32",
    "flagged": "BOOL",
    "score": "FP32",
    "samples": "INT64",
    "unpurified_label": "BYTES",
    "unpurified_index": "INT64",
    "unpurified_confidence": "FP32",
}
_RANKED = {"label": "BYTES", "index": "INT64", "confidence": "FP32", "votes": "INT64"}
OUTPUTS = (*_PLAIN, *(f"top_{name}" for name in _RANKED))


@dataclass(frozen=True)
class Envelope:
    """The parts of a request that its answer needs: the id, and the names of the requested outputs."""

    id: str | None
    outputs: tuple[str, ...]


Image = bytes | Pixels


def read(
    entries: Mapping[str, Any], binary: bytes, max_images: int
) -> tuple[tuple[Image, ...], dict[str, Any], Envelope]:
    """The images, the options and the envelope of a request.

    Args:
        entries: its JSON.
        binary: the bytes after the JSON.

    Raises:
        RequestError: the request violates the protocol, or has other inputs; the message says what is allowed.
    """
    if unknown := [name for name in entries if name not in _ENTRIES]:
        raise RequestError(f"unknown entry {quoted(unknown[0])}: there are {', '.join(_ENTRIES)}")
    options = _parameters(entries)
    name = entries.get("id")
    if name is not None and (not isinstance(name, str) or len(name) > 256):
        raise RequestError("id must be a text of at most 256 characters")
    images = _images(entries.get("inputs"), binary, max_images)
    return images, options, Envelope(name, _wanted(entries.get("outputs")))


def answer(envelope: Envelope, manifest: Manifest, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The answers for all images of a request, in order, as tensors."""
    outputs = []
    rows = [each | {f"unpurified_{key}": value for key, value in each["unpurified"].items()} for each in answers]
    for name in envelope.outputs:
        if name in _PLAIN:
            outputs.append(_tensor(name, _PLAIN[name], (len(rows),), [row[name] for row in rows]))
        else:
            key = name.removeprefix("top_")
            data = [entry[key] for each in answers for entry in each["top_k"]]
            shape = (len(answers), len(answers[0]["top_k"]))
            outputs.append(_tensor(name, _RANKED[key], shape, data))
    named = {} if envelope.id is None else {"id": envelope.id}
    drawn = {each["samples"] for each in answers}
    return {
        "model_name": manifest.name,
        "model_version": manifest.version,
        **named,
        "parameters": {"samples": drawn.pop() if len(drawn) == 1 else AUTO},
        "outputs": outputs,
    }


def metadata(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol's metadata of a model; -1 is a dynamic size.

    Args:
        manifest: the content of a bundle's pipeline.json.
    """
    kinds = [(name, kind, [-1]) for name, kind in _PLAIN.items()]
    kinds += [(f"top_{name}", kind, [-1, -1]) for name, kind in _RANKED.items()]
    return {
        "name": manifest["name"],
        "versions": [manifest["version"]],
        "platform": "mlvgm",
        "inputs": [{"name": "images", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [{"name": name, "datatype": kind, "shape": shape} for name, kind, shape in kinds],
    }


def _tensor(name: str, datatype: str, shape: tuple[int, ...], data: list[Any]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape), "data": data}


def _wanted(outputs: Any) -> tuple[str, ...]:
    if outputs is None or outputs == []:
        return OUTPUTS
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise RequestError("outputs must be a list of objects with a name")
    names = [output.get("name") for output in outputs]
    for name in names:
        if name not in OUTPUTS:
            raise RequestError(f"outputs: no tensor is called {quoted(name)}; there are {', '.join(OUTPUTS)}")
    return tuple(dict.fromkeys(names))


def _images(inputs: Any, binary: bytes, max_images: int) -> tuple[Image, ...]:
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError("inputs must be a list of one tensor, which holds the images")
    tensor = given(inputs[0])
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype not in ("BYTES", *_PIXELS):
        raise RequestError("inputs: the datatype must be BYTES (encoded images in base64), UINT8 or FP32 (pixels)")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(side) is int and 1 <= side <= _MAX_SIDE for side in shape)
    ):
        raise RequestError(f"inputs: the shape must be a list of whole numbers from 1 to {_MAX_SIDE}")
    data = _data(tensor, binary)
    if datatype == "BYTES":
        texts = _texts(data, shape, max_images)
        if not 1 <= len(texts) <= max_images or math.prod(shape) != len(texts):
            raise RequestError(f"inputs: BYTES must hold 1 to {max_images} images, and shape their number")
        return tuple(text if isinstance(text, bytes) else base64_bytes(text) for text in texts)
    if len(shape) != 4 or 3 not in (shape[1], shape[3]) or shape[0] > max_images:
        raise RequestError(f"inputs: pixels must have shape (n, H, W, 3) or (n, 3, H, W), n at most {max_images}")
    pixels = _pixels(data, datatype, shape)
    return tuple(np.ascontiguousarray(pixels if shape[3] == 3 else pixels.transpose(0, 2, 3, 1)))


def _data(tensor: Mapping[str, Any], binary: bytes) -> Any:
    """The tensor's data: bytes if it follows the JSON, otherwise a list."""
    parameters = _parameters(tensor)
    if any(name != "binary_data_size" for name in parameters):
        raise RequestError("inputs: of a tensor's parameters only binary_data_size is known; options go outside of it")
    if "data" in tensor:
        if binary:
            raise RequestError("inputs: the data is there twice, in the JSON and behind it")
        return tensor["data"]
    if type(size := parameters.get("binary_data_size")) is not int or size != len(binary):
        raise RequestError("inputs: there is no data, or binary_data_size is not the number of bytes behind the JSON")
    return binary


def _parameters(entries: Mapping[str, Any]) -> dict[str, Any]:
    parameters = entries.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError("parameters must be an object")
    return {name: value for name, value in given(parameters).items() if name not in _HINTS}


def _texts(data: Any, shape: Sequence[int], max_images: int) -> list[Any]:
    if isinstance(data, bytes):
        return list(islice(_split(data), max_images + 1))
    if not isinstance(data, list):
        raise RequestError("inputs: data must be a list")
    return _flat(data, shape)


def _split(binary: bytes) -> Iterator[bytes]:
    """Elements of a binary BYTES tensor: each is preceded by its length, 4 bytes, little-endian."""
    place = 0
    while place < len(binary):
        if place + 4 > len(binary):
            raise RequestError("inputs: the binary data ends within a length")
        (length,) = struct.unpack_from("<I", binary, place)
        place += 4 + length
        if place > len(binary):
            raise RequestError("inputs: the binary data ends within an image")
        yield binary[place - length : place]


def _pixels(data: Any, datatype: str, shape: Sequence[int]) -> Pixels:
    """Pixels as uint8 of ``shape``."""
    dtype, white = _PIXELS[datatype]
    count, kind = math.prod(shape), "numbers" if white == 1 else "whole numbers"
    refusal = RequestError(f"inputs: {datatype} must hold as many {kind} as its shape says, each from 0 to {white}")
    if isinstance(data, bytes):
        if len(data) != count * dtype.itemsize:
            raise refusal
        values = np.frombuffer(data, dtype)
    else:
        numbers = _flat(data, shape) if isinstance(data, list) else []
        kinds = {int} if datatype == "UINT8" else {int, float}
        if len(numbers) != count or not set(map(type, numbers)) <= kinds:
            raise refusal
        try:
            values = np.array(numbers, np.float64)
        except OverflowError:
            raise refusal from None
    if not (values.min() >= 0 and values.max() <= white):  # also refuses NaN
        raise refusal
    whole = np.rint(values * 255) if white == 1 else values
    return whole.astype(np.uint8).reshape(shape)


def _flat(data: list[Any], shape: Sequence[int]) -> list[Any]:
    """The values of a list row by row: it is flat, or its outer levels are nested as ``shape`` says."""
    sizes, rows = iter(shape), 1
    while data and all(isinstance(row, list) for row in data):
        rows *= next(sizes, 0)
        if len(data) != rows or len(set(map(len, data))) > 1:
            raise RequestError("inputs: data must be flat, or nested as its shape says")
        data = list(chain.from_iterable(data))
    return data
