"""What runs a bundle, in a worker of TorchServe or in a program of one's own, and asks a server that does.

from handlers import Client, Pipeline
with Pipeline.load("build/road-signs") as pipeline:
    result = pipeline.run(images, samples=8)
with Client("https://purifier.example:8443", api_key=key) as client:
    answer = client.predict(encoded_image, "road-signs", samples=8)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handlers.client import AsyncClient, Client
    from handlers.engine_calls import NonFiniteError
    from handlers.errors import InputError, MlvgmError
    from handlers.image import ImageError, decode, encode_png
    from handlers.manifest import BundleError, Manifest
    from handlers.pipeline import Pipeline
    from handlers.reply import ServerError
    from handlers.result import Result
    from handlers.runtimes import EngineError, RuntimeMissing

__all__ = [
    "AsyncClient",
    "BundleError",
    "Client",
    "EngineError",
    "ImageError",
    "InputError",
    "Manifest",
    "MlvgmError",
    "NonFiniteError",
    "Pipeline",
    "Result",
    "RuntimeMissing",
    "ServerError",
    "decode",
    "encode_png",
]

_MODULES = {
    "client": ("AsyncClient", "Client"),
    "engine_calls": ("NonFiniteError",),
    "errors": ("InputError", "MlvgmError"),
    "image": ("ImageError", "decode", "encode_png"),
    "manifest": ("BundleError", "Manifest"),
    "pipeline": ("Pipeline",),
    "reply": ("ServerError",),
    "result": ("Result",),
    "runtimes": ("EngineError", "RuntimeMissing"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import what was asked for: a worker has no client, and a client no need of a pipeline."""
    if name not in _HOMES:
        raise AttributeError(f"module 'handlers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"handlers.{_HOMES[name]}"), name)
