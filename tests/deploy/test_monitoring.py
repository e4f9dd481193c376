"""The dashboard and the alerts: every query parses and asks for what is declared, every alert fires when it should."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.server import PROJECT

promql = pytest.importorskip("promql_parser", reason="needs promql-parser")
DEPLOY = PROJECT / "deploy"
DASHBOARD = json.loads((DEPLOY / "kubernetes" / "grafana.json").read_text())
RULES = yaml.safe_load((DEPLOY / "kubernetes" / "alerts.yaml").read_text())["spec"]
ALERTS = {rule["alert"]: rule for rule in RULES["groups"][0]["rules"]}
ADDED = {"Hostname", "le", "instance"}  # by TorchServe, by histograms, by Prometheus


def declared() -> dict[str, set[str]]:
    """The series that TorchServe shows, each with its labels."""
    content = yaml.safe_load((DEPLOY / "metrics.yaml").read_text())
    series = {}
    for group in ("ts_metrics", "model_metrics"):
        for kind, metrics in content[group].items():
            for metric in metrics:
                for suffix in ("_bucket", "_sum", "_count") if kind == "histogram" else ("",):
                    series[metric["name"] + suffix] = {*metric["dimensions"], *ADDED}
    return series


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """Of the dashboard, as Grafana would send them; of the alerts; and of the autoscaler's adapter."""
    shown = [target["expr"].replace("$__rate_interval", "5m") for panel in panels() for target in panel["targets"]]
    values = yaml.safe_load((DEPLOY / "kubernetes" / "adapter-values.yaml").read_text())
    asked = [rule["metricsQuery"] for rule in values["rules"]["custom"]]
    asked = [text.replace("<<.LabelMatchers>>", 'pod="a"').replace("<<.GroupBy>>", "pod") for text in asked]
    return [*shown, *(rule["expr"] for rule in ALERTS.values()), *asked]


def selectors(query: str) -> Iterator[Any]:
    found: list[Any] = []
    promql.walk(promql.parse(query), lambda node: found.append(node))
    for node in found:
        selector = getattr(node, "vector_selector", node)
        if isinstance(selector, promql.VectorSelector):
            yield selector


@pytest.mark.parametrize("query", queries())
def test_every_query_asks_for_declared_series_and_labels(query: str) -> None:
    series = declared()
    found = list(selectors(query))
    assert found
    for selector in found:
        assert selector.name in series
        labels = {matcher.name for matcher in selector.matchers.matchers} - {"pod"}
        assert labels <= series[selector.name], selector.name


def test_the_dashboard_is_whole() -> None:
    assert {"title", "uid", "schemaVersion", "templating", "time"} <= set(DASHBOARD)
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval", "__all"}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) <= variables


def test_every_metric_of_ours_is_shown() -> None:
    shown = {selector.name for query in queries() for selector in selectors(query)}
    ours = yaml.safe_load((DEPLOY / "metrics.yaml").read_text())["model_metrics"]
    for metric in (metric["name"] for metrics in ours.values() for metric in metrics):
        assert any(name.startswith(metric) for name in shown), metric


def test_every_alert_and_panel_is_in_the_handbook() -> None:
    handbook = (PROJECT / "docs" / "operations.md").read_text()
    for name in ALERTS:
        assert f"`{name}`" in handbook, name


def per_minute(series: str, rise: float, minutes: int = 120) -> dict[str, str]:
    return {"series": series, "values": f"0+{rise:g}x{minutes}"}


MODEL = 'ModelName="m"'
HEALTHY = [
    per_minute(f'mlvgm_answers{{{MODEL}, status="200"}}', 600),
    per_minute(f'mlvgm_answers{{{MODEL}, status="503"}}', 1),
    per_minute(f"mlvgm_batch_images_sum{{{MODEL}}}", 600),
    per_minute(f"mlvgm_queue_seconds_sum{{{MODEL}}}", 60),
    per_minute(f"mlvgm_queue_seconds_count{{{MODEL}}}", 600),
    per_minute(f'mlvgm_request_seconds_bucket{{{MODEL}, le="0.1"}}', 600),
    per_minute(f'mlvgm_request_seconds_bucket{{{MODEL}, le="5"}}', 600),
    per_minute(f'mlvgm_request_seconds_bucket{{{MODEL}, le="+Inf"}}', 600),
    per_minute(f'mlvgm_fallbacks{{{MODEL}, stage="encode"}}', 0),
    per_minute(f"mlvgm_flagged{{{MODEL}}}", 20),
    per_minute(f'mlvgm_rejected{{{MODEL}, reason="image"}}', 6),
    {"series": 'WorkerLoadTime{instance="i", WorkerName="w"}', "values": "4000x120"},
]
ILL = {
    "MlvgmGone": [{"series": HEALTHY[0]["series"], "values": "1x60 _x60"}],
    "MlvgmErrors": [per_minute(f'mlvgm_answers{{{MODEL}, status="503"}}', 30)],
    "MlvgmQueueGrows": [per_minute(f"mlvgm_queue_seconds_sum{{{MODEL}}}", 1200)],
    "MlvgmSlow": [per_minute(f'mlvgm_request_seconds_bucket{{{MODEL}, le="0.1"}}', 500)],
    "MlvgmFallbacks": [per_minute(f'mlvgm_fallbacks{{{MODEL}, stage="encode"}}', 12)],
    "MlvgmFlaggedRises": [{"series": f"mlvgm_flagged{{{MODEL}}}", "values": "0+20x90 1800+200x30"}],
    "MlvgmRejects": [per_minute(f'mlvgm_rejected{{{MODEL}, reason="image"}}', 200)],
    "MlvgmWorkersDie": [
        {"series": 'WorkerLoadTime{instance="i", WorkerName="w"}', "values": "4000x100 4100x4 4200x4 4300x12"}
    ],
}


@pytest.mark.parametrize("alert", ["", *ALERTS])
@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: apt install prometheus)")
def test_an_alert_fires_when_it_should_and_no_other_does(alert: str, tmp_path: Path) -> None:
    series = {entry["series"]: entry for entry in HEALTHY}
    if alert == "MlvgmGone":
        series.clear()
    series |= {entry["series"]: entry for entry in ILL.get(alert, [])}
    tests = {
        "rule_files": [str(tmp_path / "alerts.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": list(series.values()),
                # Prometheus names what fires as ALERTS; its value is 1 for every series of it.
                "promql_expr_test": [
                    {
                        "expr": 'sort(count by (alertname) (ALERTS{alertstate="firing"}))',
                        "eval_time": "115m",
                        "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else [],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(tests))
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(RULES))
    for words in (["check", "rules", str(tmp_path / "alerts.yaml")], ["test", "rules", str(tmp_path / "test.yaml")]):
        done = subprocess.run(["promtool", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
