"""The OpenAPI document says what the server answers, and its page shows all of it."""

import configparser
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the development server: pip install '.[dev-server]'")
pytest.importorskip("openapi_spec_validator")
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from starlette.testclient import TestClient

from deploy import api
from deploy.dev_server import application
from deploy.server import PROJECT
from handlers.pipeline import Pipeline
from handlers.request import MAX_BODY, MOST_IMAGES, OPTIONS
from handlers.service import Service
from handlers.settings import HandlerSettings
from tests.deploy.test_dev_server import PATH, REQUESTS, SEED, SIGN

POST = "/predictions/{model}"


@pytest.fixture(scope="module")
def client(nvae_bundle: Path) -> Iterator[Any]:
    with Pipeline.load(nvae_bundle, "onnxruntime") as pipeline:
        service = Service(pipeline, HandlerSettings(allow_seed=True, certify_draws=64))
        with TestClient(application(pipeline.manifest, service)) as started:
            yield started


def schema(reference: str) -> Draft202012Validator:
    return Draft202012Validator({**api.document(), "$ref": reference})


def check(response: Any, path: str, method: str) -> None:
    """The response is one that the document declares, with a body of the declared form."""
    declared: Any = api.document()["paths"][path][method]["responses"]
    assert str(response.status_code) in declared, response.text
    found = declared[str(response.status_code)]
    if "$ref" in found:
        found = api.document()["components"]["responses"][found["$ref"].rpartition("/")[2]]
    kind = response.headers["content-type"]
    assert kind in found.get("content", {kind: None})
    if kind == "application/json" and "content" in found:
        Draft202012Validator({**api.document(), **found["content"][kind]["schema"]}).validate(response.json())


def test_the_version_is_that_of_the_package(client: Any) -> None:
    config = configparser.ConfigParser()
    config.read(PROJECT / "setup.cfg")
    version = config["metadata"]["version"]
    assert api.document()["info"]["version"] == client.get("/v2").json()["version"] == version


def test_the_document_is_valid() -> None:
    validate(api.document())


@pytest.mark.parametrize("name", REQUESTS)
def test_every_answer_has_the_declared_form(name: str, client: Any) -> None:
    body, headers = REQUESTS[name]
    for method in ("post", "put"):
        check(getattr(client, method)(PATH, content=body, headers=headers), POST, method)
    check(client.post("/v2/models/tiny/infer", content=body, headers=headers), "/v2/models/{model}/infer", "post")


def test_a_certificate_has_the_declared_form(client: Any) -> None:
    response = client.post(PATH, content=SIGN, headers=SEED | {"x-mlvgm-certify": "64"})
    assert "certified_l2" in response.json()
    check(response, POST, "post")


@pytest.mark.parametrize(
    "path", ["/v2/models/{model}", "/v2/models/{model}/ready", "/v2/health/ready", "/v2/health/live"]
)
def test_every_question_is_answered_as_declared(path: str, client: Any) -> None:
    check(client.get(path.replace("{model}", "tiny")), path, "get")
    if "{model}" in path and not path.endswith("ready"):
        check(client.get(path.replace("{model}", "other")), path, "get")


def test_refusals_before_the_pipeline_are_declared(client: Any) -> None:
    check(client.post("/predictions/other", content=SIGN), POST, "post")
    check(client.post(PATH, content=b"x" * (MAX_BODY + 1)), POST, "post")


def test_every_request_in_json_has_the_declared_form() -> None:
    body = schema("#/paths/~1predictions~1{model}/post/requestBody/content/application~1json/schema")
    for name in ("JSON", "JSON list", "tensors"):
        body.validate(json.loads(REQUESTS[name][0]))
    assert not body.is_valid({"image": "x", "samples": 0})
    assert not body.is_valid({"images": ["x"] * (MOST_IMAGES + 1)})


def test_the_document_has_every_option() -> None:
    components = api.document()["components"]
    assert set(components["schemas"]["Options"]["properties"]) == set(OPTIONS)
    headers = {parameter["name"] for parameter in components["parameters"].values() if parameter["in"] == "header"}
    assert {name.lower() for name in headers} == {"x-mlvgm-" + name.replace("_", "-") for name in OPTIONS}
    assert f"{MAX_BODY:,}" in api.document()["paths"][POST]["post"]["requestBody"]["description"]


def test_the_page_shows_all_of_it_and_asks_no_other_host(client: Any) -> None:
    response = client.get("/")
    text = html.unescape(re.sub(r"<[^>]+>", " ", response.text))
    for path in api.document()["paths"]:
        assert path.replace("{model}", "tiny") in text
    for name in ("X-Mlvgm-Samples", "agreement", "certified_l2", "429"):
        assert name in text
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"<script|src=|url\(", response.text)
    assert set(re.findall(r"href=['\"]?([^'\" >]+)", response.text)) <= {"openapi.json"} | {
        f"#{name}" for name in api.document()["components"]["schemas"]
    }
    assert client.get("/openapi.json").json() == api.document()
