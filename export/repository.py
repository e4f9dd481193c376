"""Model repositories: the single graph of a bundle, laid out for Triton, OpenVINO Model Server, or KServe.

OUT/NAME/1/model.onnx     the graph and, as model.onnx.data, its weights; 2, 3, ... for later bundles of this name
OUT/NAME/pipeline.json    the manifest of the bundle, with its version and the digest of every file
OUT/NAME/classes.txt      the classes, one a line, in the order of the logits
OUT/NAME/config.pbtxt     triton, kserve: the model's settings
OUT/config.json           ovms: the models of the repository, and their settings
OUT/NAME-SERVER.yaml      kserve: an InferenceService for each of the servers, triton and openvino
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
import yaml
from onnx import TensorProto

from export.archive import ArchiveError, ArchiveSettings, fitting_batch, fitting_queue
from export.single_graph import FOLDER, GRAPH, REPORT
from handlers import files
from handlers.fields import read_strict
from handlers.manifest import FILE_NAME, FileDigest, Manifest, Samples
from mlvgm.files import scratch

Kind = Literal["triton", "ovms", "kserve"]

CONFIG = "config.pbtxt"
CLASSES = "classes.txt"
_DATA = f"{GRAPH}.data"

_TRITON = {"runtime", "threads", "batch_size", "batch_delay_ms", "queue", "max_wait_s"}
_SETTINGS: Mapping[Kind, set[str]] = {"triton": _TRITON, "ovms": {"runtime", "threads"}, "kserve": _TRITON}
"""The settings of an archive that another server can keep as well."""

_DEVICES = {"auto": "KIND_AUTO", "onnxruntime": "KIND_CPU", "onnxruntime-cuda": "KIND_GPU"}
_RUNTIMES: Mapping[Kind, tuple[str, ...]] = {
    "triton": tuple(_DEVICES),
    "ovms": ("auto", "openvino"),
    "kserve": ("auto",),  # each InferenceService names its own
}
_TYPES: dict[int, str] = {
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.INT64: "TYPE_INT64",
}


def build_repository(
    bundle: str | Path,
    out: str | Path,
    kind: Kind,
    settings: ArchiveSettings | None = None,
    instances: int = 1,
    storage_uri: str = "",
) -> Path:
    """Check ``bundle`` and put its single graph into the model repository ``out``; returns the folder of the model.

    Other models of the repository stay. The same bundle is written again under its number, another one of the same name
    under the next.

    Args:
        instances: copies of the graph that compute at the same time.
        storage_uri: kserve: where the cluster finds the content of ``out``, such as s3://bucket/models.

    Raises:
        BundleError: the bundle is damaged or inconsistent.
        FieldError: a setting is out of its range.
        ArchiveError: the bundle has no single graph, or a setting or argument is none of this server's.
    """
    bundle, out = Path(bundle), Path(out)
    settings = read_strict(ArchiveSettings, dataclasses.asdict(settings or ArchiveSettings()))
    _check(kind, settings, storage_uri)
    manifest = Manifest.read(bundle)
    if f"{FOLDER}/{GRAPH}" not in manifest.files or REPORT not in manifest.report:
        raise ArchiveError(f"{bundle}: has no single graph: run mlvgm export --bundle {bundle} --single-graph first")
    model = out / manifest.name
    model.mkdir(parents=True, exist_ok=True)
    _copy_graph(bundle, model)
    files.replace(model / CLASSES, "".join(f"{' '.join(name.split())}\n" for name in manifest.classes))
    if kind == "ovms":
        _list_model(out / "config.json", manifest, settings, instances)
    else:
        files.replace(model / CONFIG, _triton_config(manifest, bundle, settings, instances))
    if kind == "kserve":
        for server, service in _inference_services(manifest, bundle, settings, instances, storage_uri).items():
            files.replace(out / f"{manifest.name}-{server}.yaml", yaml.safe_dump(service, sort_keys=False))
    return model


def _check(kind: Kind, settings: ArchiveSettings, storage_uri: str) -> None:
    for field in dataclasses.fields(ArchiveSettings):
        if field.name not in _SETTINGS[kind] and getattr(settings, field.name) != field.default:
            raise ArchiveError(f"{field.name} cannot be set for {kind}: leave it out, or archive for torchserve")
    if settings.runtime not in _RUNTIMES[kind]:
        raise ArchiveError(f"the runtime for {kind} is {' or '.join(_RUNTIMES[kind])}, not {settings.runtime}")
    if (kind == "kserve") != bool(storage_uri):
        raise ArchiveError("kserve, and no other format, needs the storage URI from which the cluster loads the models")
    if storage_uri and not re.fullmatch(r"[a-z0-9]+://[^\s/]\S*", storage_uri):
        raise ArchiveError(
            f"the storage URI is {storage_uri!r}, should be like s3://bucket/models or pvc://claim/models"
        )


def _copy_graph(bundle: Path, model: Path) -> None:
    """Into a new version of the model, or into its newest if that is of the same bundle; and the manifest beside it."""
    numbers = [int(path.name) for path in model.iterdir() if re.fullmatch(r"[1-9][0-9]{0,8}", path.name)]
    manifest = model / FILE_NAME
    known = manifest.is_file() and manifest.read_bytes() == (bundle / FILE_NAME).read_bytes()
    version = model / str(max(numbers) + (not known) if numbers else 1)
    # Servers read only folders whose name is a number, so none sees an incomplete version.
    with scratch(model) as work:
        draft = work / "made"
        draft.mkdir()
        for file in (GRAPH, _DATA):
            if (bundle / FOLDER / file).exists():
                shutil.copyfile(bundle / FOLDER / file, draft / file)
        if version.exists():
            version.rename(work / "old")
        draft.rename(version)
    shutil.copyfile(bundle / FILE_NAME, manifest)


def _triton_config(manifest: Manifest, bundle: Path, settings: ArchiveSettings, instances: int) -> str:
    """The text form of Triton's ``ModelConfig``; shapes and types are those of the graph."""
    graph = onnx.load(str(bundle / FOLDER / GRAPH), load_external_data=False).graph
    samples = Samples(manifest.report[REPORT]["samples"], manifest.samples.max)
    fixed = dataclasses.replace(manifest, samples=samples)
    batch = settings.batch_size or fitting_batch(fixed, settings.runtime)
    queue = settings.queue or fitting_queue(fixed, settings.runtime, batch)
    (images,) = graph.input
    outputs = "".join(f"output {{ {_tensor(output)} }}\n" for output in graph.output)
    values = {"mlvgm_version": manifest.version, "mlvgm_manifest_sha256": _digest(bundle)}
    if settings.threads:
        values["intra_op_thread_count"] = str(settings.threads)
    parameters = "".join(f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}\n' for k, v in values.items())
    return f"""\
name: "{manifest.name}"
backend: "onnxruntime"
max_batch_size: {batch}
version_policy {{ latest {{ num_versions: 1 }} }}
input {{ {_tensor(images)} }}
{outputs}instance_group {{ count: {instances} kind: {_DEVICES[settings.runtime]} }}
dynamic_batching {{
  max_queue_delay_microseconds: {settings.batch_delay_ms * 1000}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {settings.max_wait_s * 1_000_000}
    max_queue_size: {queue}
  }}
}}
model_warmup {{
  name: "zeros"
  batch_size: {batch}
  inputs {{ key: "{images.name}" value {{ {_type_and_shape(images)} zero_data: true }} }}
}}
{parameters}"""


def _tensor(value: onnx.ValueInfoProto) -> str:
    """One input or output; one number for each image is a list of one to Triton's clients."""
    text = f'name: "{value.name}" {_type_and_shape(value)}'
    if len(value.type.tensor_type.shape.dim) == 1:
        text += " reshape { shape: [ ] }"
    return text + (f' label_filename: "{CLASSES}"' if value.name in ("votes", "mean_logits") else "")


def _type_and_shape(value: onnx.ValueInfoProto) -> str:
    """Without the batch axis."""
    tensor = value.type.tensor_type
    sizes = [size.dim_value for size in tensor.shape.dim[1:]] or [1]
    return f"data_type: {_TYPES[tensor.elem_type]} dims: {sizes}"


def _plugin_config(manifest: Manifest, settings: ArchiveSettings, instances: int) -> dict[str, str]:
    """OpenVINO's settings. Without a hint it would compute in bf16 wherever the CPU can."""
    config = {"INFERENCE_PRECISION_HINT": "bf16" if manifest.precision == "bf16" else "f32"}
    config["NUM_STREAMS"] = str(instances)
    return config | ({"INFERENCE_NUM_THREADS": str(settings.threads)} if settings.threads else {})


def _list_model(file: Path, manifest: Manifest, settings: ArchiveSettings, instances: int) -> None:
    """List the model in ``file``, in the place of one of the same name."""
    content: Any = {}
    try:
        if file.exists():
            content = json.loads(file.read_text(encoding="utf-8"))
        others = [one for one in content.get("model_config_list", []) if one["config"]["name"] != manifest.name]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ArchiveError(f"{file}: no configuration of OpenVINO Model Server: move it away, or mend it") from None
    config = {
        "name": manifest.name,
        "base_path": manifest.name,  # relative to the file
        "nireq": instances,
        "plugin_config": _plugin_config(manifest, settings, instances),
    }
    listed = {**content, "model_config_list": [*others, {"config": config}]}
    files.replace(file, json.dumps(listed, indent=2) + "\n")


def _inference_services(
    manifest: Manifest, bundle: Path, settings: ArchiveSettings, instances: int, storage_uri: str
) -> dict[str, dict[str, Any]]:
    """By server. Triton loads all models below the URI, OpenVINO Model Server the one whose folder it is given."""
    uri = storage_uri.rstrip("/")
    plugin = json.dumps(_plugin_config(manifest, settings, instances))
    models: dict[str, dict[str, Any]] = {
        "triton": {"runtime": "kserve-tritonserver", "storageUri": uri},
        "openvino": {
            "runtime": "kserve-openvino",
            "storageUri": f"{uri}/{manifest.name}",
            "args": [f"--nireq={instances}", f"--plugin_config={plugin}"],
        },
    }
    # A service's name: lower-case letters, digits and hyphens, a letter first; its domain has 63 characters at most.
    name = re.sub(r"[^a-z0-9]+", "-", manifest.name.lower()).strip("-")
    name = (name if name[:1].isalpha() else f"m-{name}")[:40].rstrip("-")
    return {
        server: {
            "apiVersion": "serving.kserve.io/v1beta1",
            "kind": "InferenceService",
            "metadata": {
                "name": f"{name}-{server}",
                "annotations": {
                    "mlvgm/bundle": manifest.name,
                    "mlvgm/version": manifest.version,
                    "mlvgm/manifest-sha256": _digest(bundle),
                },
            },
            "spec": {
                "predictor": {
                    "model": {"modelFormat": {"name": "onnx", "version": "1"}, "protocolVersion": "v2", **model}
                }
            },
        }
        for server, model in models.items()
    }


def _digest(bundle: Path) -> str:
    return FileDigest.of(bundle / FILE_NAME).sha256
