"""Which Python packages are installed."""

import importlib.metadata


def version(distribution: str) -> str | None:
    """The version of a package, by its name on PyPI; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
