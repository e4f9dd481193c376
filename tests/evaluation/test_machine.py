import pytest
import torch

from evaluation import report


def test_a_report_names_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    without = report.conditions(report.measured_here())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert report.conditions(report.measured_here()) == f"A GPU, {without}"
