"""A multipart form (RFC 7578) as a proxy hands it over: the body as bytes, and its content type under `HEADER`.

TorchServe would read a form itself: it answers a malformed one with 500, keeps only the last of several fields of one
name, and buffers without limit (CVE-2024-29025). deploy/nginx.conf therefore hides forms from it.
"""

from handlers.strict_json import RequestError

HEADER = "x-form-type"

_MOST_PARTS = 32


def read(body: bytes | bytearray, content_type: str) -> list[tuple[str, bytes]]:
    """The name and the content of every field, in order.

    Args:
        content_type: ``multipart/form-data; boundary=...``.

    Raises:
        RequestError: no such form, or one of more than 32 fields.
    """
    # Here, because an archive on a stock TorchServe, without a proxy, does without the package.
    from multipart import MultipartError, PushMultipartParser, parse_options_header

    kind, parameters = parse_options_header(content_type)
    if kind != "multipart/form-data" or not parameters.get("boundary"):
        raise RequestError("a form needs the content type multipart/form-data; boundary=...")
    fields: list[tuple[str, bytes]] = []
    name, content = "", bytearray()
    limits = {"content_length": len(body), "max_segment_count": _MOST_PARTS}
    try:
        with PushMultipartParser(parameters["boundary"], strict=True, **limits) as parser:
            for event in parser.parse(body):
                if event is None:
                    fields.append((name, bytes(content)))
                elif isinstance(event, bytes | bytearray):
                    content += event
                else:
                    name, content = event.name or "", bytearray()
    except MultipartError:
        raise RequestError("the form is malformed, or broken off") from None
    return fields
