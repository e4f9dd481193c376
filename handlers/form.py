"""Multipart forms (RFC 7578), which nginx forwards as plain bytes with their content type in the header `HEADER`.

TorchServe's own form reader answers a malformed form with 500, keeps only the last of several fields with one name, and
buffers without limit (CVE-2024-29025). deploy/nginx.conf therefore hides forms from it.
"""

from handlers.strict_json import RequestError

HEADER = "x-form-type"

_MOST_PARTS = 32


def read(body: bytes | bytearray, content_type: str) -> list[tuple[str, bytes]]:
    """The name and the content of every field, in order.

    Args:
        content_type: ``multipart/form-data; boundary=...``.

    Raises:
        RequestError: the form is malformed, or has more than 32 fields.
    """
    # Imported here, because an archive on a stock TorchServe without nginx does not need the package.
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
