"""The page of ``mlvgm playground``: attack a picture, and see what the purifier makes of it. Built with Gradio.

What purifies is a bundle in this process (`BundleBackend`) or a running server (`ServerBackend`). The page needs no
other host: its fonts are those of the system, and its policy for browsers forbids all else.
"""

import base64
import html
import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from evaluation import contact_sheet
from evaluation.photographs import encode, to_pixels
from evaluation.signs import drawn_signs
from handlers import certify
from handlers.answer import describe
from handlers.arrays import Pixels
from handlers.client import Client, Options
from handlers.engine_calls import NonFiniteError
from handlers.errors import MlvgmError
from handlers.image import decode
from handlers.pipeline import Pipeline
from handlers.request import MAX_BODY, parse

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr

Picture = tuple[Pixels, str]
"""Pixels (H, W, 3), and what is written below them."""

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'"
)
"""Content-Security-Policy: a browser then asks no other host, whatever the toolkit's scripts say."""

_STRONGEST = 3.0  # L2 norm of an attack
_STEPS = 20
_FIRST = "stop"
_DRAWS = {"none": 0, "100 noisy images": 100, "1000 noisy images": 1000}
_STYLE = """
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); gap: 12px }
.pictures figure { margin: 0 }
.pictures img { width: 100%; image-rendering: pixelated }
"""
_FONTS = ("system-ui", "sans-serif")


@dataclass(frozen=True)
class Answer:
    """The answer to one image, as a server's JSON says it, and the pictures that can be shown of it."""

    content: dict[str, Any]
    pictures: list[Picture]


class Backend(Protocol):
    """Answers one encoded image.

    Attributes:
        name: of the model.
        alphas: the schedules of alphas by name, the default first; empty where they cannot be changed.
        most_samples: largest number of samples; 0 where it is not known.
    """

    name: str
    alphas: dict[str, tuple[float, ...]]
    most_samples: int

    def purify(self, image: bytes, samples: int, seed: int, alphas: Sequence[float], draws: int) -> Answer:
        """With ``draws`` noisy images for a certificate. Raises MlvgmError, in the words of a server's answer."""


class BundleBackend:
    """A bundle's pipeline in this process, which shows every sample."""

    def __init__(self, pipeline: Pipeline) -> None:
        manifest = pipeline.manifest
        self._pipeline, self._manifest = pipeline, manifest
        self.name, self.most_samples = manifest.name, manifest.samples.max
        default = manifest.default_alphas
        self.alphas = {default: manifest.alphas[default], **manifest.alphas}

    def purify(self, image: bytes, samples: int, seed: int, alphas: Sequence[float], draws: int) -> Answer:
        request = parse({"body": image}, {}, self._manifest)
        start = time.perf_counter()
        pixels = decode(request.images[0], self._manifest.image_size)[None]
        decode_ms = (time.perf_counter() - start) * 1000
        try:
            result = self._pipeline.run(pixels, samples, [seed], alphas=alphas)
            # All that is resampled is replaced, so that the rest of the picture is what is kept.
            kept = self._pipeline.run(pixels, 1, [seed], alphas=[float(alpha > 0) for alpha in alphas])
            certified = self._pipeline.certify(pixels, draws=draws, alphas=alphas) if draws else None
        except NonFiniteError as error:
            raise MlvgmError(f"stage {error.stage} overflowed on this image") from None
        classes = self._manifest.classes
        more = {} if certified is None else certify.answer(certified, 0, classes)
        content = describe(result, 0, request, classes, decode_ms, more).content
        shown = [(to_pixels(kept.purified[0, 0].transpose(1, 2, 0)), "what is kept")]
        for k, (sample, label) in enumerate(zip(result.purified[0], result.sample_labels[0], strict=True), 1):
            shown.append((to_pixels(sample.transpose(1, 2, 0)), f"sample {k}: {classes[label]}"))
        return Answer(content, shown)


class ServerBackend:
    """A running server, which gives one purified sample and chooses noise and alphas itself."""

    def __init__(self, client: Client, model: str) -> None:
        self._client, self.name = client, model
        self.alphas: dict[str, tuple[float, ...]] = {}
        self.most_samples = 0

    def purify(self, image: bytes, samples: int, seed: int, alphas: Sequence[float], draws: int) -> Answer:
        options: Options = {"samples": samples, "certify": draws} if draws else {"samples": samples}
        content = self._client.predict(image, self.name, **options)
        png, drawn = self._client.purify(image, self.name, samples=samples)
        with Image.open(io.BytesIO(png)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        return Answer(content, [(pixels, f"a sample of another vote: {drawn['label']}")])


@dataclass(frozen=True)
class Attacker:
    """Attacks pictures through a classifier, which it reads as pixels (H, W, 3) of its ``size``."""

    classifier: Any
    classes: Sequence[str]
    size: tuple[int, int]

    def read(self, pixels: Pixels) -> str:
        from evaluation.attacks import predict

        return self.classes[int(predict(self.classifier, pixels[None])[0])]

    def attack(self, pixels: Pixels, l2: float) -> Pixels:
        """``pixels`` changed by at most ``l2``, away from what is read in them, by Auto-PGD."""
        import torch

        from evaluation.adaptive import Effort, Trace, ascend
        from evaluation.attacks import predict, to_bytes, to_float
        from evaluation.changes import L2

        labels = torch.from_numpy(predict(self.classifier, pixels[None]))
        found = ascend(
            lambda images, _: Trace(self.classifier(images)[None]),
            to_float(pixels[None]),
            labels,
            L2(l2),
            Effort(_STEPS),
        )
        return to_bytes(found.images)[0]


def build(purifier: Backend, attacker: Attacker | None, why_not: str = "") -> Any:
    """The page.

    Args:
        attacker: None where pictures cannot be attacked; ``why_not`` is shown then.
    """
    signs = {sign.name: encode(sign.image) for sign in drawn_signs()}
    names = list(purifier.alphas)
    default = purifier.alphas[names[0]] if names else ()
    with gr.Blocks(title=f"mlvgm playground: {purifier.name}", analytics_enabled=False) as page:
        gr.Markdown(f"# Purify a picture with {purifier.name}")
        with gr.Row():
            with gr.Column(min_width=300):
                sign = gr.Radio(list(signs), value=_FIRST, label="Pick a drawn sign", elem_id="sign")
                upload = gr.UploadButton("Or upload a picture", type="binary", elem_id="upload")
                note = f"Not possible: {why_not}" if attacker is None else "L2 norm; 0 changes nothing"
                strength = gr.Slider(
                    0, _STRONGEST, 1 if attacker else 0, step=0.05, label="Strength of the attack", info=note,
                    interactive=attacker is not None, elem_id="strength",
                )  # fmt: skip
                samples = gr.Slider(1, purifier.most_samples or 64, 8, step=1, label="Samples that vote")
                draws = gr.Dropdown(
                    list(_DRAWS), value="none", label="Certificate", info="a proven radius; takes longer",
                    elem_id="draws",
                )  # fmt: skip
                seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0, visible=bool(names))
                title = "Alphas, coarse to fine: 0 keeps a latent, 1 replaces it"
                with gr.Accordion(title, open=False, visible=bool(names), elem_id="alphas"):
                    schedule = gr.Dropdown(names, value=names[0] if names else None, label="Schedule")
                    alphas = [
                        gr.Slider(0, 1, alpha, step=0.01, label=f"Latent {i} of {len(default)}")
                        for i, alpha in enumerate(default, 1)
                    ]
                again = gr.Button("Purify", variant="primary", elem_id="purify")
            with gr.Column(min_width=300, scale=2):
                result = gr.Markdown(elem_id="result")  # whose HTML Gradio sanitizes
                votes = gr.Label(label="Votes", show_heading=False, elem_id="votes")
                with gr.Accordion("The answer, as a server gives it", open=False):
                    answer = gr.JSON(show_label=False)
        chosen = gr.State(signs[_FIRST])

        def run(image: bytes, strength: float, samples: int, draws: str, seed: int, *alphas: float) -> tuple[Any, ...]:
            try:
                return answered(purifier, attacker, image, strength, samples, int(seed or 0), alphas, _DRAWS[draws])
            except MlvgmError as error:
                text = str(error)
                return f'<p role="alert"><b>Refused:</b> {_text(text)}</p>', None, {"error": text}

        ask: dict[str, Any] = {
            "fn": run,
            "inputs": [chosen, strength, samples, draws, seed, *alphas],
            "outputs": [result, votes, answer],
            "concurrency_id": "pipeline",
            "trigger_mode": "always_last",
            "show_progress": "minimal",
        }
        sign.input(signs.get, sign, chosen).then(**ask)
        upload.upload(lambda file: (file, None), upload, [chosen, sign]).then(**ask)
        if names:
            schedule.input(lambda name: list(purifier.alphas[name]), schedule, alphas).then(**ask)
        sliders = [slider.release for slider in (strength, samples, *alphas)]
        gr.on([page.load, again.click, seed.submit, draws.input, *sliders], **ask)
    return page


def answered(
    purifier: Backend,
    attacker: Attacker | None,
    image: bytes,
    strength: float,
    samples: int,
    seed: int,
    alphas: Sequence[float],
    draws: int = 0,
) -> tuple[str, dict[str, float], dict[str, Any]]:
    """What the page shows: the result as HTML, the share of the votes by class, and the whole answer.

    Raises:
        MlvgmError: the image or an option is refused.
    """
    if len(image) > MAX_BODY:
        raise MlvgmError("the body is larger than 6.5 MB")
    pictures = []
    if attacker:
        clean = decode(image, attacker.size)
        pictures.append((clean, f"original: {attacker.read(clean)}"))
        if strength:
            attacked = attacker.attack(clean, strength)
            image = encode(attacked)
            pictures.append((attacked, f"attacked: {attacker.read(attacked)}"))
            pictures.append((np.asarray(contact_sheet.change(clean, attacked).pixels), contact_sheet.CHANGE))
    purified = purifier.purify(image, samples, seed, alphas, draws)
    content = purified.content
    timings = ", ".join(f"{name} {value:.1f}" for name, value in content["timing_ms"].items())
    lines = (
        f"<h2>{_text(content['label'])}</h2>",
        f"<p>{content['agreement']:.0%} of {content['samples']} samples agree. Without purification: "
        f"<b>{_text(content['unpurified']['label'])}</b>{', so it is flagged' if content['flagged'] else ''}. "
        f"Attack score {content['score']:.2f}.{certificate(content)}</p>",
        *_figures([*pictures, *purified.pictures]),
        f"<p>Milliseconds: {timings}</p>",
    )
    shares = {entry["label"]: entry["votes"] / content["samples"] for entry in content["top_k"] if entry["votes"]}
    return "".join(lines), shares, content


def certificate(content: dict[str, Any]) -> str:
    """What an answer says of its certificate, as HTML; nothing where it has none."""
    if "certified_l2" not in content:
        return ""
    if content["abstained"]:
        return f" <b>No class is certified</b> by {content['draws']} noisy images."
    return (
        f" <b>Certified:</b> no change below {content['certified_l2']:.2f} (L2 norm) makes the vote of noisy images "
        f"anything but {_text(content['certified_label'])}; wrong with a probability of {content['alpha']:g} at most."
    )


def _figures(pictures: Sequence[Picture]) -> Iterator[str]:
    yield '<div class="pictures">'
    for pixels, caption in pictures:
        text, png = _text(caption), base64.b64encode(encode(pixels)).decode()
        yield f'<figure><img src="data:image/png;base64,{png}" alt="{text}"><figcaption>{text}</figcaption></figure>'
    yield "</div>"


def launch(page: Any, port: int) -> str:
    """Serve ``page`` on loopback until `page.close`; returns its URL."""
    fonts = [gr.themes.Font(name) for name in _FONTS]
    theme = gr.themes.Default(font=fonts, font_mono=[gr.themes.Font("monospace")])
    _, url, _ = page.launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size=MAX_BODY + 1,
        theme=theme,
        css=_STYLE,
        app_kwargs={"middleware": [(_Policy, (), {})], "docs_url": None, "redoc_url": None},
    )
    return str(url)


class _Policy:
    """ASGI middleware that sends `POLICY` with every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, with_policy)


def _text(text: str) -> str:
    """For HTML within Markdown, which an empty line would end."""
    return html.escape(" ".join(text.split()))
