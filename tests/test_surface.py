"""What users import stands in `__all__`, in order, and is there."""

import importlib

import pytest


@pytest.mark.parametrize("package", ["handlers", "mlvgm"])
def test_what_users_import_is_there(package: str) -> None:
    pytest.importorskip("torch" if package == "mlvgm" else "numpy")
    module = importlib.import_module(package)
    assert [name for name in sorted(module._HOMES) if hasattr(module, name)] == module.__all__
