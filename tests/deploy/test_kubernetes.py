"""The manifests: against Kubernetes' own schemas, and against each other."""

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.health import Health
from deploy.readiness import Readiness
from deploy.server import PROJECT, Server
from deploy.supervisor import parser
from mlvgm.cli.main import VERBS

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
FOLDER = PROJECT / "deploy" / "kubernetes"
VERSIONS = ("1.33", "1.37")
FOREIGN = {
    "Gateway",
    "Kustomization",
    "PodMonitor",
    "PrometheusRule",
    "TLSRoute",
}  # kinds that Kubernetes itself does not know
Document = dict[str, Any]


def documents() -> dict[str, Document]:
    """Everything that is applied, by kind, and what the user makes a copy of."""
    files = [path for path in sorted(FOLDER.glob("*.yaml")) if path.name != "adapter-values.yaml"]
    return {document["kind"]: document for file in files for document in yaml.safe_load_all(file.read_text())}


DOCUMENTS = documents()
POD = DOCUMENTS["Deployment"]["spec"]["template"]
TORCHSERVE, NGINX = POD["spec"]["initContainers"][0], POD["spec"]["containers"][0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", sorted(set(DOCUMENTS) - FOREIGN))
def test_each_fits_its_schema(kind: str, version: str) -> None:
    kubernetes_validate.validate(DOCUMENTS[kind], version, strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "replicas"), "two"),
        ("Deployment", ("spec", "template", "spec", "initContainers", 0, "readynessProbe"), {}),
        ("HorizontalPodAutoscaler", ("spec", "maxReplicas"), None),
        ("NetworkPolicy", ("spec", "ingres"), []),
    ],
)
def test_a_wrong_one_would_not_fit(kind: str, path: tuple[str | int, ...], value: Any) -> None:
    wrong = copy.deepcopy(DOCUMENTS[kind])
    place: Any = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_kustomization_lists_every_file_but_those_for_others() -> None:
    listed = set(DOCUMENTS["Kustomization"]["resources"])
    mine = {path.name for path in FOLDER.glob("*.yaml") if not path.name.endswith(".example.yaml")}
    assert listed == mine - {"kustomization.yaml", "adapter-values.yaml"}


def test_every_selector_finds_the_pods() -> None:
    labels = POD["metadata"]["labels"].items()
    assert labels >= DOCUMENTS["Service"]["spec"]["selector"].items()
    assert labels >= DOCUMENTS["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert labels >= DOCUMENTS[kind]["spec"]["selector"]["matchLabels"].items()
    target = DOCUMENTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", DOCUMENTS["Deployment"]["metadata"]["name"])


def test_every_port_is_one_that_nginx_listens_on() -> None:
    ports = {port["name"]: port["containerPort"] for port in NGINX["ports"]}
    conf = "".join((PROJECT / "deploy" / name).read_text() for name in ("nginx.conf", "nginx-metrics.conf"))
    assert all(f"listen {port}" in conf for port in ports.values())
    used = {port["targetPort"] for port in DOCUMENTS["Service"]["spec"]["ports"]}
    used |= {port["port"] for rule in DOCUMENTS["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
    used |= {endpoint["port"] for endpoint in DOCUMENTS["PodMonitor"]["spec"]["podMetricsEndpoints"]}
    assert used == set(ports)
    assert "ports" not in TORCHSERVE, "TorchServe is on loopback"


@pytest.mark.parametrize("container", [TORCHSERVE, NGINX], ids=lambda container: container["name"])
def test_containers_are_locked_down_and_bounded(container: Document) -> None:
    context = POD["spec"]["securityContext"] | container["securityContext"]
    assert context["runAsNonRoot"]
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert {"cpu", "memory"} == set(container["resources"]["limits"]) == set(container["resources"]["requests"])
    assert all("sizeLimit" in volume["emptyDir"] for volume in POD["spec"]["volumes"] if "emptyDir" in volume)
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in POD["spec"]["volumes"]}


def test_the_pod_has_time_to_drain() -> None:
    """nginx may take `--drain` seconds once the endpoints have forgotten the pod; then TorchServe is stopped."""
    assert TORCHSERVE["restartPolicy"] == "Always", "a sidecar outlives the containers"
    drain = parser().parse_args(NGINX["args"]).drain
    before = NGINX["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert before + drain < POD["spec"]["terminationGracePeriodSeconds"]


def test_the_arguments_are_those_of_the_pair() -> None:
    assert parser().parse_args(NGINX["args"]).only == "nginx"
    options = parser().parse_args(TORCHSERVE["args"])
    assert options.only == "torchserve"
    assert options.models is None, "the image has the archives that are served"
    assert TORCHSERVE["startupProbe"]["exec"]["command"] == ["mlvgm", "ready"], "of the port that is the default"
    assert TORCHSERVE["image"] == NGINX["image"] == DOCUMENTS["Kustomization"]["images"][0]["name"]


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe"])
def test_a_pod_lives_while_it_answers(probe: str) -> None:
    program, verb, *_ = TORCHSERVE[probe]["exec"]["command"]
    assert (program, verb) == ("mlvgm", "ready")
    assert verb in VERBS


def test_a_pod_is_ready_when_nginx_says_so() -> None:
    probe = NGINX["readinessProbe"]["httpGet"]
    assert probe["scheme"] == "HTTPS"
    assert probe["port"] in {port["name"] for port in NGINX["ports"]}
    health = Health(Path("health.sock"), Readiness(Server(), 60), Server)
    assert health.answer(probe["path"]) == (503, {"ready": False})


def test_the_secrets_hold_what_nginx_includes() -> None:
    conf = (PROJECT / "deploy" / "nginx.conf").read_text()
    private = next(volume for volume in POD["spec"]["volumes"] if volume["name"] == "private")
    names = [source["secret"]["name"] for source in private["projected"]["sources"]]
    assert DOCUMENTS["Secret"]["metadata"]["name"] in names
    (file,) = DOCUMENTS["Secret"]["stringData"]
    assert f"private/{file}" in conf
    assert next(m for m in NGINX["volumeMounts"] if m["name"] == "private")["mountPath"] == "/etc/mlvgm/private"


def test_the_autoscaler_alone_says_how_many_pods_there_are() -> None:
    assert "replicas" not in DOCUMENTS["Deployment"]["spec"]
    assert DOCUMENTS["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2


def test_the_dashboard_is_a_config_map() -> None:
    (generated,) = DOCUMENTS["Kustomization"]["configMapGenerator"]
    (file,) = generated["files"]
    assert (FOLDER / file.partition("=")[2]).is_file()


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_kustomize_builds_it() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    assert set(built) == (set(DOCUMENTS) | {"ConfigMap"}) - {
        "Kustomization",
        "Secret",
        "Gateway",
        "Ingress",
        "TLSRoute",
    }
    (image,) = DOCUMENTS["Kustomization"]["images"]
    pod = built["Deployment"]["spec"]["template"]["spec"]
    used = {container["image"] for container in pod["containers"] + pod["initContainers"]}
    assert used == {f"{image['newName']}:{image['newTag']}"}


def test_the_autoscaler_goes_by_a_metric_that_the_adapter_makes() -> None:
    (metric,) = DOCUMENTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    values = yaml.safe_load((FOLDER / "adapter-values.yaml").read_text())
    assert metric["pods"]["metric"]["name"] in {rule["name"]["as"] for rule in values["rules"]["custom"]}


def test_both_ways_in_lead_to_the_service() -> None:
    service = DOCUMENTS["Service"]
    (port,) = service["spec"]["ports"]
    (rule,) = DOCUMENTS["Ingress"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": service["metadata"]["name"], "port": {"name": port["name"]}}
    route = DOCUMENTS["TLSRoute"]["spec"]
    assert route["rules"] == [{"backendRefs": [{"name": service["metadata"]["name"], "port": port["port"]}]}]
    (listener,) = DOCUMENTS["Gateway"]["spec"]["listeners"]
    assert route["parentRefs"] == [{"name": DOCUMENTS["Gateway"]["metadata"]["name"], "sectionName": listener["name"]}]
    assert listener["tls"] == {"mode": "Passthrough"}
