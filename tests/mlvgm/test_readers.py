"""Every hostile or broken checkpoint gets one `CheckpointError` that names the file and the first offending key."""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from mlvgm import checkpoint, nvae
from mlvgm.avae import read_avae
from mlvgm.checkpoint import CheckpointError, read_checkpoint
from mlvgm.e4e import read_e4e
from mlvgm.ndvae import read_ndvae
from mlvgm.nvae import read_nvae
from mlvgm.resnet import read_resnet50, read_resnext50
from mlvgm.style_transformer import read_style_transformer
from mlvgm.vgg import read_vgg11
from tests.handlers.test_memory import resident
from tests.mlvgm import small

Reader = Callable[[Path], nn.Module]
READERS: dict[str, tuple[Reader, small.Checkpoint, str]] = {
    "e4e": (read_e4e, small.e4e(), "decoder.convs.0.conv.weight"),
    "style_transformer": (
        read_style_transformer,
        small.style_transformer(),
        "encoder.module.transformerlayer_fine.linear1.bias",
    ),
    "resnet50": (lambda path: read_resnet50(path, 3), small.resnet(), "model.layer3.0.conv1.weight"),
    "resnext50": (lambda path: read_resnext50(path, 3), small.resnet(32), "model.fc.0.weight"),
    "vgg11": (lambda path: read_vgg11(path, 3), small.vgg(), "model.features.8.weight"),
    "avae": (
        lambda path: read_avae(path, small.AVAE_SIZE),
        {"state_dict": small.avae()},
        "generator.progression.1.conv2.conv.weight_orig",
    ),
    "ndvae": (
        lambda path: read_ndvae(path, small.ndvae_h()),
        {"state_dict": small.ndvae()},
        "decoder.samplers.1.cell.weight",
    ),
    "nvae": (read_nvae, small.nvae(), "decoder_tower.scale_1.group_0.cell_0.residual.1.weight"),
}
STYLEGAN = ("e4e", "style_transformer")
WEIGHTS = {family: "state_dict_temp=0.6" if family == "nvae" else "state_dict" for family in READERS}


def refusal(family: str, path: Path) -> str:
    """The reader's complaint, which has to name the file."""
    with pytest.raises(CheckpointError) as caught:
        READERS[family][0](path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def fresh(family: str) -> small.Checkpoint:
    return copy.deepcopy(READERS[family][1])


@pytest.mark.parametrize("family", READERS)
def test_the_sound_file_loads(family: str, tmp_path: Path) -> None:
    module = READERS[family][0](small.save(fresh(family), tmp_path))
    assert not module.training
    assert not any(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("family", READERS)
def test_mapped_weights_are_those_of_the_file_and_take_no_memory(family: str, tmp_path: Path) -> None:
    path = small.save(fresh(family), tmp_path)
    copied = READERS[family][0](path).state_dict()
    assert not any(within(path, tensor) for tensor in copied.values())
    with checkpoint.mapped():
        shared = READERS[family][0](path).state_dict()
    assert resident(path) == [0]
    assert all(within(path, tensor) for name, tensor in shared.items() if name != "latent_avg")
    assert all(torch.equal(tensor, shared[name]) for name, tensor in copied.items())
    assert resident(path) > [0]


def within(path: Path, tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` lies in ``path`` as this process sees it, where it cannot be written."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, rights, *_, name = line.split()
        start, end = (int(address, 16) for address in place.split("-"))
        if name == str(path) and start <= tensor.data_ptr() < end:
            return rights == "r--p"
    return False


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("content", [b"", b"not a checkpoint\n", b"PK\x03\x04 nor a zip file"])
def test_no_checkpoint_at_all(family: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    path.write_bytes(content)
    refusal(family, path)


@pytest.mark.parametrize("family", READERS)
def test_truncated(family: str, tmp_path: Path) -> None:
    path = small.save(fresh(family), tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refusal(family, path)


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("family", READERS)
def test_pickled_code_is_never_run(family: str, tmp_path: Path) -> None:
    checkpoint = fresh(family)
    checkpoint["opts"] = Payload(tmp_path / "ran")
    assert "code" in refusal(family, small.save(checkpoint, tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("other", READERS)
def test_wrong_family(family: str, other: str, tmp_path: Path) -> None:
    if family != other:
        refusal(family, small.save(fresh(other), tmp_path))


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("content", [[], None, torch.zeros(3), {}, {"state_dict": None}, {"state_dict": [1, 2]}])
def test_not_the_layout(family: str, content: Any, tmp_path: Path) -> None:
    if isinstance(content, dict) and content:
        content = {**content, "opts": fresh("e4e")["opts"] | fresh("style_transformer")["opts"]}
    refusal(family, small.save(content, tmp_path))


def test_missing_file(tmp_path: Path) -> None:
    refusal("e4e", tmp_path / "nowhere.pt")


BROKEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "narrow": lambda tensor: tensor[:-1],
    "flat": lambda tensor: tensor.flatten()[None, :, None],
    "nan": lambda tensor: tensor * float("nan"),
    "infinite": lambda tensor: tensor / 0,
    "integers": lambda tensor: tensor.long(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "list": lambda tensor: tensor.flatten().tolist()[:4],
    "none": lambda tensor: None,
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "huge": lambda tensor: torch.zeros(1).expand(1 << 40),
}


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("fault", BROKEN)
def test_broken_tensor(family: str, fault: str, tmp_path: Path) -> None:
    checkpoint, key = fresh(family), READERS[family][2]
    checkpoint[WEIGHTS[family]][key] = BROKEN[fault](checkpoint[WEIGHTS[family]][key])
    assert repr(key) in refusal(family, small.save(checkpoint, tmp_path))


@pytest.mark.parametrize("family", READERS)
def test_missing_tensor(family: str, tmp_path: Path) -> None:
    checkpoint, key = fresh(family), READERS[family][2]
    del checkpoint[WEIGHTS[family]][key]
    assert repr(key) in refusal(family, small.save(checkpoint, tmp_path))


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("key", ["decoder.extra.weight", 7])
def test_unexpected_tensor(family: str, key: Any, tmp_path: Path) -> None:
    checkpoint = fresh(family)
    checkpoint[WEIGHTS[family]][key] = torch.zeros(2)
    assert repr(key) in refusal(family, small.save(checkpoint, tmp_path))


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("e4e", "decoder.input.input"),
        ("e4e", "decoder.style.1.weight"),
        ("e4e", "encoder.body.3.res_layer.1.weight"),
        ("e4e", "encoder.input_layer.0.weight"),
        ("style_transformer", "encoder.module.transformerlayer_coarse.linear1.weight"),
        ("style_transformer", "decoder.module.convs.2.conv.weight"),
        ("style_transformer", "decoder.module.to_rgbs.2.bias"),
        ("resnet50", "model.conv1.weight"),
        ("resnext50", "model.conv1.weight"),
    ],
)
def test_tensors_that_give_the_widths(family: str, key: str, tmp_path: Path) -> None:
    checkpoint = fresh(family)
    value = checkpoint[WEIGHTS[family]].pop(key)
    assert "missing" in refusal(family, small.save(checkpoint, tmp_path))
    for wrong in (value[:0], value[None], value.flatten(), torch.zeros(1).expand(3, 7, 5), 3):
        checkpoint[WEIGHTS[family]][key] = wrong
        refusal(family, small.save(checkpoint, tmp_path))


@pytest.mark.parametrize("family", ["resnet50", "resnext50"])
def test_another_number_of_classes(family: str, tmp_path: Path) -> None:
    read = {"resnet50": read_resnet50, "resnext50": read_resnext50}[family]
    with pytest.raises(CheckpointError, match=r"'model\.fc\.3\.weight' has shape \(3, 512\), expected \(5, 512\)"):
        read(small.save(fresh(family), tmp_path), 5)


OPTIONS: list[tuple[str, str, Any]] = [
    *(("e4e", "stylegan_size", value) for value in ("32", 32.0, True, None, 0, -32, 48, 2**40, [32], 64)),
    *(("style_transformer", "output_size", value) for value in ("32", 32.0, True, None, 0, 48, 2**40, 64)),
    *((family, "start_from_latent_avg", value) for family in STYLEGAN for value in ("yes", 1, None, [True])),
    *(("e4e", "encoder_type", value) for value in ("GradualStyleEncoder", 3, None)),
    *(("style_transformer", "learn_in_w", value) for value in (True, None, "no")),
]


@pytest.mark.parametrize(("family", "option", "value"), OPTIONS)
def test_strange_option(family: str, option: str, value: Any, tmp_path: Path) -> None:
    checkpoint = fresh(family)
    checkpoint["opts"][option] = value
    message = refusal(family, small.save(checkpoint, tmp_path))
    if value != 64:  # a size that exists, but not with these tensors: then a tensor is named
        assert repr(option) in message


@pytest.mark.parametrize("family", STYLEGAN)
@pytest.mark.parametrize("opts", [None, [], "opts", torch.zeros(1)])
def test_strange_options(family: str, opts: Any, tmp_path: Path) -> None:
    checkpoint = fresh(family)
    checkpoint["opts"] = opts
    assert "'opts'" in refusal(family, small.save(checkpoint, tmp_path))


@pytest.mark.parametrize("option", ["stylegan_size", "start_from_latent_avg", "encoder_type"])
def test_missing_option(option: str, tmp_path: Path) -> None:
    checkpoint = fresh("e4e")
    del checkpoint["opts"][option]
    assert repr(option) in refusal("e4e", small.save(checkpoint, tmp_path))


@pytest.mark.parametrize("family", STYLEGAN)
@pytest.mark.parametrize(
    "value",
    [None, "mean", torch.zeros(3), torch.zeros(2, 16), torch.zeros(8, 16).long(), torch.full((8, 16), float("nan"))],
)
def test_strange_mean_code(family: str, value: Any, tmp_path: Path) -> None:
    checkpoint = fresh(family)
    checkpoint["latent_avg"] = value
    assert "'latent_avg'" in refusal(family, small.save(checkpoint, tmp_path))
    del checkpoint["latent_avg"]
    assert "'latent_avg'" in refusal(family, small.save(checkpoint, tmp_path))


def test_a_wide_file_cannot_ask_for_more_than_the_published_widths(tmp_path: Path) -> None:
    # A view of one number claims any shape at no cost on disk.
    checkpoint = fresh("e4e")
    for key, value in checkpoint["state_dict"].items():
        if value.is_floating_point() and value.ndim:
            checkpoint["state_dict"][key] = torch.zeros(1).expand(
                [1024] * value.ndim if value.ndim < 5 else [1, 1024, 1024, 3, 3]
            )
    assert "has shape" in refusal("e4e", small.save(checkpoint, tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": -1},
        {"kernel": 10**9 + 1},
        {"num_scales": 10**6},
        {"num_scales": 6, "num_groups_per_scale": 64, "num_cells_per_group": 16},
        {"num_scales": 6, "num_groups_per_scale": 64, "num_nf_cells": 16},
    ],
)
def test_an_nvae_configuration_that_cannot_be_meant(
    changes: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before layers are made of it, which would take minutes, or raise anything."""
    checkpoint = fresh("nvae")
    checkpoint["configuration"]["autoencoder"] |= changes
    checkpoint["configuration"]["resolution"] = [3, 1024, 1024]
    monkeypatch.setattr(nvae, "encoder_cell", None)
    assert refusal("nvae", small.save(checkpoint, tmp_path)).count("describes no NVAE (ValueError") == 1


@pytest.mark.parametrize("start", [b"<", b"  <", b"\x80\x02", b"\x1f\x8b", b"BZh"])
def test_safetensors_are_known_whatever_the_length_of_their_header_reads_as(start: bytes, tmp_path: Path) -> None:
    """A web page, a pickle, gzip: the file begins with the length of its header, in bytes."""
    content = safetensors.torch.save({"a": torch.arange(3.0)})
    length = int.from_bytes(content[:8], "little")
    padded = int.from_bytes(start, "little")
    padded += -(-(length - padded) // 2 ** (8 * len(start))) * 2 ** (8 * len(start)) if padded < length else 0
    header = content[8 : 8 + length] + b" " * (padded - length)
    (tmp_path / "own").write_bytes(padded.to_bytes(8, "little") + header + content[8 + length :])
    assert read_checkpoint(tmp_path / "own")["state_dict"]["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Not Found\n", "not a PyTorch checkpoint and not a safetensors file"),
        (b"\x93NUMPY\x01\x00", "not a PyTorch checkpoint and not a safetensors file"),
        (
            b'{"metadata": {"total_size": 1}, "weight_map": {"a": "1-of-2.safetensors"}}',
            "index of shards",
        ),
        (b'{"error": "not found"}', "a server's error"),
    ],
)
def test_what_is_no_checkpoint_is_not_said_to_need_code(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_checkpoint(tmp_path / "own.pt")
    assert "code" not in str(caught.value)


def test_another_pickle_protocol_is_told_with_its_cure(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "own.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"pickle protocol 2.*torch\.save\(model\.state_dict"):
        read_checkpoint(tmp_path / "own.pt")
