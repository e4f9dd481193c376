"""The page of the playground, along a person's path in headless Chromium, and what it shows without one."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs Gradio: pip install '.[playground]'")
pytest.importorskip("torch")

from evaluation import playground
from evaluation.photographs import encode
from evaluation.playground import Attacker, BundleBackend, ServerBackend, answered, certificate
from handlers.client import Client
from handlers.errors import MlvgmError
from handlers.pipeline import Pipeline
from handlers.reply import ServerError
from tests import bundles
from tests.evaluation import models
from tests.machine import free_port

PICTURE = encode(models.pictures(1)[0])
GIF = (
    b"GIF89a\x01\x00\x01\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"
)


@pytest.fixture(scope="module")
def pipeline(nvae_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(nvae_bundle, "onnxruntime") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def attacker(nvae_bundle: Path) -> Attacker:
    return Attacker(models.of_bundle(nvae_bundle), bundles.CLASSES, (bundles.SIZE, bundles.SIZE))


def captions(result: str) -> list[str]:
    return [part.partition("</figcaption>")[0] for part in result.split("<figcaption>")[1:]]


def test_a_bundles_answer_is_that_of_its_pipeline(pipeline: Pipeline, attacker: Attacker) -> None:
    pixels = models.pictures(1)
    expected = pipeline.run(pixels, 4, [7], alphas=[0.5, 1.0])
    result, votes, content = answered(BundleBackend(pipeline), attacker, PICTURE, 0, 4, 7, [0.5, 1.0])
    label = bundles.CLASSES[expected.labels[0]]
    assert content["label"] == label
    assert content["samples"] == 4
    assert votes == {bundles.CLASSES[i]: n / 4 for i, n in enumerate(expected.votes[0]) if n}
    named = [f"sample {k}: {bundles.CLASSES[i]}" for k, i in enumerate(expected.sample_labels[0], 1)]
    assert captions(result) == [f"original: {content['unpurified']['label']}", "what is kept", *named]
    assert f"<h2>{label}</h2>" in result


def test_a_certificate_is_that_of_the_pipeline(pipeline: Pipeline) -> None:
    result, _, content = answered(BundleBackend(pipeline), None, PICTURE, 0, 1, 0, [0.0, 0.0], draws=100)
    assert (content["draws"], content["sigma"]) == (100, 0.25)
    said = "No class is certified" if content["abstained"] else f"no change below {content['certified_l2']:.2f}"
    assert said in result
    sure = {"certified_l2": 0.3, "abstained": False, "certified_label": "<a>", "alpha": 0.001, "draws": 9}
    assert "no change below 0.30 (L2 norm) makes the vote of noisy images anything but &lt;a&gt;" in certificate(sure)
    assert "No class is certified" in certificate(sure | {"abstained": True})


def test_an_attack_stays_within_its_strength_and_is_what_is_purified(pipeline: Pipeline, attacker: Attacker) -> None:
    (clean,) = models.pictures(1)
    attacked = attacker.attack(clean, 2.0)
    rounding = np.sqrt(attacked.size) / 2 / 255
    assert 0 < np.linalg.norm((attacked.astype(float) - clean) / 255) <= 2.0 + rounding
    assert attacker.read(attacked) != attacker.read(clean)
    result, _, content = answered(BundleBackend(pipeline), attacker, PICTURE, 2.0, 1, 0, [0.0, 0.0])
    assert content["unpurified"]["label"] == attacker.read(attacked)
    assert captions(result)[1:3] == [f"attacked: {attacker.read(attacked)}", "the change, x5"]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "no image"),
        (GIF, "not a JPEG, PNG, WebP or BMP image, but GIF"),
        (b"x" * 7_000_000, "larger than 6.5 MB"),
        (PICTURE[:60], "truncated|damaged"),
        (encode(np.full((8, 8, 3), 255, np.uint8)), "stage encode overflowed on this image"),
    ],
)
def test_errors_are_worded_as_the_server_words_them(
    image: bytes, words: str, pipeline: Pipeline, attacker: Attacker
) -> None:
    for one in (attacker, None):
        with pytest.raises(MlvgmError, match=words):
            answered(BundleBackend(pipeline), one, image, 0, 2, 0, [0.5, 1.0])


def test_a_name_of_a_class_is_no_markup(pipeline: Pipeline) -> None:
    class Named(BundleBackend):
        def purify(self, *arguments: Any) -> playground.Answer:
            made = super().purify(*arguments)
            return playground.Answer({**made.content, "label": "<b>\n\nx"}, [(made.pictures[0][0], '"><script>')])

    result, _, _ = answered(Named(pipeline), None, PICTURE, 0, 1, 0, [0.5, 1.0])
    assert "<h2>&lt;b&gt; x</h2>" in result
    assert "<script" not in result
    assert "\n\n" not in result, "an empty line would end the HTML within the Markdown"


def test_a_server_is_asked(nvae_bundle: Path, pipeline: Pipeline) -> None:
    testclient = pytest.importorskip("starlette.testclient")
    from deploy.dev_server import application
    from handlers.service import Service

    with testclient.TestClient(application(pipeline.manifest, Service(pipeline))) as app, Client() as client:
        client._http = app
        asked = ServerBackend(client, "tiny")
        result, votes, content = answered(asked, None, PICTURE, 0, 3, 0, [])
        assert content["samples"] == 3
        assert sum(votes.values()) == pytest.approx(1)
        assert len(captions(result)) == 1
        with pytest.raises(ServerError, match="samples"):
            answered(asked, None, PICTURE, 0, 60, 0, [])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, to drive a browser")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def url(pipeline: Pipeline, attacker: Attacker) -> Iterator[str]:
    page = playground.build(BundleBackend(pipeline), attacker)
    yield playground.launch(page, free_port())
    page.close(verbose=False)


MINUTES = 180_000  # milliseconds: a busy machine must not fail this
SHOWN = "document.querySelectorAll('#result figure').length"


def wait(page: Any, condition: str) -> None:
    """Until the condition holds; asked from here, for the page's policy forbids to watch for it there."""
    for _ in range(MINUTES // 100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    pytest.fail(f"{condition} never came; the page shows {page.inner_text('body')}")


def upload(page: Any, name: str, kind: str, content: bytes) -> None:
    """By keyboard; while an answer is on its way, the button may not react yet."""
    chosen: list[Any] = []
    page.once("filechooser", lambda dialog: chosen.append(dialog))  # a builtin cannot be given
    for _ in range(MINUTES // 5000):
        page.focus("#upload")
        page.keyboard.press("Enter")
        for _ in range(50):
            if chosen:
                chosen[0].set_files({"name": name, "mimeType": kind, "buffer": content})
                return
            page.wait_for_timeout(100)
    pytest.fail("the button opens no dialog")


def test_a_persons_path_by_keyboard(browser: Any, url: str) -> None:
    page = browser.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.goto(url, timeout=MINUTES)
    wait(page, f"{SHOWN} == 12")  # original, attacked, the change, what is kept, 8 samples
    assert page.locator("#result img:not([alt]), #result img[alt='']").count() == 0

    first = page.evaluate("document.querySelector('#result img').src")
    page.focus("#sign input:checked")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    wait(page, f"{SHOWN} == 12 && document.querySelector('#result img').src != {first!r}")

    page.fill("#strength input[type=number]", "0")
    page.keyboard.press("Tab")
    page.focus("#purify")
    page.keyboard.press("Enter")
    wait(page, f"{SHOWN} == 10")

    page.focus("#alphas button")
    page.keyboard.press("Enter")
    wait(page, "document.querySelectorAll('#alphas input[type=number]').length == 2")
    for field in page.locator("#alphas input[type=number]").all():
        field.fill("0")
    page.focus("#purify")
    page.keyboard.press("Enter")
    # Where nothing is resampled, all samples are what is kept.
    wait(page, "new Set([...document.querySelectorAll('#result img')].slice(1).map(i => i.src)).size == 1")

    upload(page, "x.gif", "image/gif", GIF)
    wait(page, "document.querySelector('#result').innerText.includes('not a JPEG, PNG, WebP or BMP image, but GIF')")
    upload(page, "x.png", "image/png", PICTURE)
    wait(page, f"{SHOWN} == 10")

    hosts = {address.split("/")[2] for address in asked if "://" in address}
    assert hosts == {url.split("/")[2]}
    assert wrong == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Any, url: str, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(url, timeout=MINUTES)
    wait(page, f"{SHOWN} == 12")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, *_ = (int(part) for part in colour.strip("rgba()").split(",")[:3])
    assert (red < 80) == (scheme == "dark")
    context.close()


def test_every_answer_forbids_other_hosts(url: str) -> None:
    import httpx

    assert httpx.get(url).headers["content-security-policy"] == playground.POLICY
    assert url.startswith("http://127.0.0.1:")
    for host in ("google", "cdn", "huggingface", "cloudflare"):
        assert host not in playground.POLICY
