"""Forms as clients write them."""

TYPE = "multipart/form-data; boundary=x"


def written(*fields: tuple[str, bytes]) -> bytes:
    """A multipart form of these names and contents, in their order."""
    parts = [b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (n.encode(), c) for n, c in fields]
    return b"".join([*parts, b"--x--\r\n"])
