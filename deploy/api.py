"""The description of the API (openapi.yaml), and a page that shows it without scripts or any other host."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import yaml


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI document."""
    return yaml.safe_load(Path(__file__).with_name("openapi.yaml").read_text(encoding="utf-8"))


def page(model: str) -> str:
    """The document as HTML, with ``model`` in the examples."""
    info = document()["info"]
    title = f"{info['title']} {info['version']}: {model}"
    parts = list[str]()
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            if method != "parameters":
                parts += _operation(method, path.replace("{model}", model), operation)
    for name, schema in document()["components"]["schemas"].items():
        if rows := [(f"<code>{escape(field)}</code>", _kind(kind)) for field, kind in _fields(schema)]:
            parts += [f"<h2 id={name}>{name}</h2>", *_table(("field", "value"), rows)]
    known = {"title": title, "description": info["description"], "model": model}
    template = Template(Path(__file__).with_name("api.html").read_text(encoding="utf-8"))
    return template.substitute({name: escape(text) for name, text in known.items()}, content="\n".join(parts))


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<h2><span class=method>{method}</span> <code>{escape(path)}</code></h2>"
    yield f"<p>{escape(operation['summary'])}</p>"
    if parameters := [_resolved(parameter) for parameter in operation.get("parameters", ())]:
        rows = [(f"<code>{p['name']}</code>", _kind(p["schema"]), escape(p["description"])) for p in parameters]
        yield from _table(("header", "values", "meaning"), rows)
    bodies = operation.get("requestBody", {}).get("content", {})
    yield from _table(("body", ""), [(escape(kind), _kind(body["schema"])) for kind, body in bodies.items()])
    for status, response in operation["responses"].items():
        response = _resolved(response)
        kinds = " or ".join(_kind(body["schema"]) for body in response.get("content", {}).values())
        yield f"<p><b>{status}</b> {escape(response['description'])}. {kinds}</p>"


def _table(heads: Iterable[str], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    if rows:
        yield "<table><tr>" + "".join(f"<th>{head}" for head in heads)
        yield from ("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
        yield "</table>"


def _kind(schema: Mapping[str, Any]) -> str:
    """Which values a schema allows, as HTML."""
    if "$ref" in schema:
        resolved, name = _resolved(schema), schema["$ref"].rpartition("/")[2]
        return f"<a href='#{name}'>{name}</a>" if list(_fields(resolved)) else _kind(resolved)
    if "oneOf" in schema:
        return " or ".join(map(_kind, schema["oneOf"]))
    if "items" in schema:
        return f"list of {_kind(schema['items'])}"
    if "allOf" in schema:
        return ", with more: ".join(map(_kind, schema["allOf"]))
    values = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    kind = schema.get("type", "")
    said = [", ".join(map(str, values)) or (" or ".join(kind) if isinstance(kind, list) else kind)]
    said += [f"{word} {schema[bound]}" for word, bound in (("from", "minimum"), ("to", "maximum")) if bound in schema]
    return escape(": ".join(filter(None, (" ".join(said), schema.get("description", "")))))


def _fields(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for base in schema.get("allOf", ()):
        yield from _fields(_resolved(base))
    yield from schema.get("properties", {}).items()


def _resolved(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" not in schema:
        return schema
    found: Any = document()
    for name in schema["$ref"].split("/")[1:]:
        found = found[name]
    return found
