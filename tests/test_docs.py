"""What the documents claim: their code runs, their links lead somewhere."""

import configparser
import re
from pathlib import Path

import pytest
import torch

from export.compare import relative_error
from export.stage import as_tuple
from export.trace import example, trace

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("model_store/*/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_to_headings_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
        text = (document.parent / target if target else document).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_what_is_to_be_installed_can_be() -> None:
    """The package is on no index: a checkout or a wheel gives its extras, and an index the libraries it requires."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    required = "\n".join([config["options"]["install_requires"], *extras.values()])
    libraries = {re.split(r"[^\w-]", line.strip())[0] for line in required.splitlines()}
    folders = ("deploy", "evaluation", "export", "handlers", "mlvgm")
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")]
    texts += [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    places = [match for text in texts for match in re.findall(r"pip install (?:-e )?'?(\S*)\[([\w,]+)\]'", text)]
    assert len(places) >= 3
    for place, names in places:
        assert place == "." or place.endswith(".whl"), place
        assert set(names.split(",")) <= set(extras), names
    named = {name for text in texts for name in re.findall(r"pip install '?([a-z][\w-]+)(?=[\s\"'`=>)])", text)}
    assert {"torchserve", "onnxruntime"} < named <= libraries


def test_every_verb_in_the_documents_exists() -> None:
    verbs = {path.stem for path in (ROOT / "mlvgm" / "cli").glob("*.py")}
    for document in DOCUMENTS:
        for verb in re.findall(r"^\s*(?:\$ )?mlvgm ([a-z]+)", document.read_text(encoding="utf-8"), re.MULTILINE):
            assert verb in verbs, f"{document.name} shows mlvgm {verb}"


def test_the_worked_family_exports_and_agrees_with_its_reference(tmp_path: Path) -> None:
    import onnxruntime as ort

    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "new-family.md").read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "worked_family"}
    exec(compile(code, "new-family.md", "exec"), names)
    family = names["MeanColour"]()  # type: ignore[operator]
    for stage in names["stages"](family):  # type: ignore[operator]
        file = tmp_path / f"{stage.name}.onnx"
        trace(stage, file)
        inputs = [example(spec, 3) for spec in stage.inputs]
        feeds = {spec.name: tensor.numpy() for spec, tensor in zip(stage.inputs, inputs, strict=True)}
        with torch.no_grad():
            expected = as_tuple(stage.reference(*inputs))
        for found, eager in zip(ort.InferenceSession(str(file)).run(None, feeds), expected, strict=True):
            assert relative_error(found, eager.numpy()) < 1e-5
