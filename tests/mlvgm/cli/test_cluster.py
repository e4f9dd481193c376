"""Bulk jobs on a Ray cluster of two nodes: the bytes of a job without it, also when a node dies."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deploy.errors import CliError
from mlvgm.cli.bulk import Bulk
from mlvgm.cli.cluster import workers
from mlvgm.cli.main import main
from mlvgm.cli.purify import FilePurifier
from tests import bundles
from tests.clusters import cluster

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    with cluster(1, 1) as made:
        yield made


def signs(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(bundles.images(1, seed=i)[0]).save(folder / f"{i:04d}.png")
    return folder


def pngs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.parametrize("address", ["local", "ray://127.0.0.1:10001", "127.0.0.1:1", "no such host:1"])
def test_where_no_cluster_is(
    address: str, nvae_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked before there is one."""
    folder = signs(tmp_path / "in", 1)
    assert main(["purify", str(folder), "--bundle", str(nvae_bundle), "--out", str(tmp_path), "--ray", address]) == 2
    assert f"no Ray cluster at {address}: " in capsys.readouterr().err


def test_the_bytes_are_those_of_a_job_without_it(two_nodes: Any, nvae_bundle: Path, tmp_path: Path) -> None:
    folder = signs(tmp_path / "in", 30)
    (folder / "broken.png").write_bytes(b"no image")
    words = ["purify", str(folder), "--bundle", str(nvae_bundle), "--runtime", "onnxruntime", "--seed", "3"]
    for name, options in (("here", ["--threads", "1"]), ("there", ["--ray", two_nodes.address])):
        assert main([*words, "--out", str(tmp_path / name), *options]) == 1
    assert len(pngs(tmp_path / "here")) == 30
    assert pngs(tmp_path / "there") == pngs(tmp_path / "here")


def test_workers_whose_bundle_is_another_end_the_job(two_nodes: Any, nvae_bundle: Path, tmp_path: Path) -> None:
    make = {"bundle": nvae_bundle, "runtime": "onnxruntime", "threads": 1}
    with (
        workers(two_nodes.address, 1, make, {"bundle": "another"}) as (submit, _),
        pytest.raises(CliError, match="is another one"),
    ):
        submit([b""])()


def test_an_image_that_ends_its_worker_is_named_and_its_neighbours_go_on(
    two_nodes: Any, nvae_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(_make: Any, _settings: Any, images: list[bytes]) -> list[str]:
        if b"deadly" in images:
            os._exit(1)
        return ["fine"] * len(images)

    monkeypatch.setattr("mlvgm.cli.cluster._purify", deadly)
    with workers(two_nodes.address, 1, {}, {}) as (submit, _):
        first, second, third = submit([b"a", b"deadly", b"b"])()
    assert (first, third) == ("fine", "fine")
    assert "its worker was lost 3 times" in second


def test_a_node_that_dies_within_a_job(two_nodes: Any, nvae_bundle: Path, tmp_path: Path) -> None:
    """Last of this file: no image is lost, and none is written twice."""
    folder = signs(tmp_path / "in", 60)
    make = {"bundle": nvae_bundle, "runtime": "onnxruntime", "threads": 1, "seed": 3, "samples": 2}
    with FilePurifier(**make) as purifier, workers(two_nodes.address, 1, make, purifier.settings) as (submit, ahead):
        job = Bulk([folder], tmp_path / "out", "purified", purifier.settings, batch=2)
        files = []
        for row in job.run_ahead(submit, ahead):
            assert "error" not in row
            files.append(row["file"])
            if len(files) == 10:
                two_nodes.remove_node(next(iter(two_nodes.worker_nodes)), allow_graceful=False)
        assert sorted(files) == sorted(str(path) for path in folder.iterdir())
        list(Bulk([folder], tmp_path / "here", "purified", purifier.settings, batch=2).run(purifier.purify))
    assert pngs(tmp_path / "out") == pngs(tmp_path / "here")
