"""deploy/kubernetes, as kubectl builds it: what Kubernetes checks, and what it would only find out at run time."""

import base64
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from pydantic_settings import BaseSettings

from encryption import EncryptionSettings
from jobs import names
from jobs.classes import BACKGROUND_QUEUE_SUFFIX
from llm_pb import llm_pb2
from services.gateway.settings import GatewaySettings
from services.notifier.settings import NotifierSettings
from tests.support.certificates import Authority
from tests.support.deployments import PROBES, SETTINGS, dockerfile, ports, problems
from tests.support.paths import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
EVERYTHING, VERSIONED = "examples/everything", "examples/versioned"
TEMPORAL = FOLDER / "base" / "settings" / "temporal.env"
AUTHORITY = Authority(Path(tempfile.mkdtemp()))
PAIR = AUTHORITY.issue("any")
TLS = {"tls.crt": PAIR.cert.read_text(), "tls.key": PAIR.key.read_text(), "ca.crt": AUTHORITY.pem.decode()}
SECRETS = {
    "api-keys": {"keys.json": "[]"},
    "encryption": {"keyring.json": json.dumps({"current": "1", "keys": {"1": base64.b64encode(bytes(32)).decode()}})},
    "gateway": {"page-token-key": "k" * 32},
    "gateway-tls": TLS,
    "http-session-key": {"key": base64.b64encode(bytes(32)).decode()},
    "http-tls": TLS,
    "nats-ca": {"ca.crt": AUTHORITY.pem.decode()},
    "nats-gateway": {"seed": "SU"},
    "nats-gpu-worker": {"seed": "SU"},
    "notifier": {"webhook-secrets": '["whsec_bmV3ZXIgMDEyMzQ1Njc4OTAxMjM0NTY3"]'},
    "store": {"access-key-id": "id", "secret-access-key": "key"},
    "temporal": {"api-key": "key"},
    "temporal-client": TLS,
}
"""The secrets that an installation has, with their keys. docs/kubernetes.md names them."""
NAME = "app.kubernetes.io/name"
GRACE_MARGIN = 10
"""Minimum time in seconds between the end of a service's own grace and SIGKILL."""


def program(name: str) -> str:
    found = shutil.which(name, path=f"{ROOT / '.tools' / 'deploy' / 'bin'}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not there: make tools")
    return found


@functools.cache
def built(folder: str) -> tuple[dict[str, Any], ...]:
    command = [program("kubectl"), "kustomize", str(FOLDER / folder)]
    text = subprocess.run(command, check=True, capture_output=True).stdout
    return tuple(yaml.load_all(text, Loader=yaml.CSafeLoader))


@pytest.fixture(params=[EVERYTHING, VERSIONED], ids=lambda folder: folder.rpartition("/")[2])
def objects(request: pytest.FixtureRequest) -> tuple[dict[str, Any], ...]:
    return built(request.param)


class Pod(NamedTuple):
    """The pods of a Deployment."""

    name: str
    template: dict[str, Any]
    environment: dict[str, str]
    files: dict[str, Path]
    """The files in the container, each with one that stands for it."""

    @property
    def labels(self) -> Mapping[str, str]:
        return self.template["metadata"]["labels"]

    @property
    def spec(self) -> dict[str, Any]:
        return self.template["spec"]

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self.spec["containers"]
        return container

    @property
    def service(self) -> str:
        return self.labels["app.kubernetes.io/component"].replace("-", "_")

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    def settings(self, number: int = 0) -> type[BaseSettings]:
        return SETTINGS[self.service][number]


def of_kind(objects: tuple[dict[str, Any], ...], *kinds: str) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] in kinds]


def name_of(one: dict[str, Any]) -> str:
    return str(one["metadata"]["name"])


@pytest.fixture
def pods(objects: tuple[dict[str, Any], ...], tmp_path: Path) -> list[Pod]:
    maps = {name_of(one): one["data"] for one in of_kind(objects, "ConfigMap")}
    found = []
    for one in of_kind(objects, "Deployment", "WorkerDeployment"):
        template = one["spec"]["template"]
        (container,) = template["spec"]["containers"]
        environment: dict[str, str] = {}
        for source in container["envFrom"]:
            environment |= maps[source["configMapRef"]["name"]]
        for variable in container.get("env", ()):
            secret = variable.get("valueFrom", {}).get("secretKeyRef")
            value = SECRETS[secret["name"]][secret["key"]] if secret else variable["value"]
            environment[variable["name"]] = value
        files = dict(mounted(template["spec"], container, tmp_path))
        found.append(Pod(name_of(one), template, environment, files))
    return found


def mounted(spec: dict[str, Any], container: dict[str, Any], folder: Path) -> Iterator[tuple[str, Path]]:
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for mount in container["volumeMounts"]:
        volume = volumes[mount["name"]]
        if "emptyDir" in volume:
            yield mount["mountPath"], folder
        sources = [source["secret"]["name"] for source in volume.get("projected", {}).get("sources", ())]
        sources += [volume["secret"]["secretName"]] if "secret" in volume else []
        for source in sources:
            for key, content in SECRETS[source].items():
                path = folder / f"{source}-{key}"
                path.write_text(content)
                yield f"{mount['mountPath']}/{key}", path


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    rules = [(one["key"], one["values"]) for one in selector.get("matchExpressions", ())]
    rules += [(key, [value]) for key, value in selector.get("matchLabels", {}).items()]
    return all(labels.get(key) in values for key, values in rules)


def test_kubernetes_would_take_it(objects: tuple[dict[str, Any], ...], tmp_path: Path) -> None:
    """Custom resources have no schema there."""
    path = tmp_path / "objects.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    checked = subprocess.run(
        [program("kubernetes-validate"), "--strict", str(path)], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_service_gets_settings_that_it_takes_and_listens_where_others_call(pods: list[Pod]) -> None:
    assert {pod.service for pod in pods} == SETTINGS.keys()
    for pod in pods:
        assert not problems(pod.service, pod.environment, pod.files), pod.name
        listens = ports(pod.service, pod.environment)
        assert pod.ports["metrics"] == listens["metrics_port"]
        own = {port for name, port in pod.ports.items() if name != "metrics"}
        no_api = pod.environment.get("GATEWAY_ROLE") == "workflows"
        assert own == (set() if no_api or "port" not in listens else {listens["port"]}), pod.name
    for pod in pods:
        for other in pods:
            if pod.service != other.service:
                prefix = str(other.settings().model_config.get("env_prefix"))
                assert not [name for name in pod.environment if name.startswith(prefix)]


def test_probes_ask_what_is_answered(pods: list[Pod]) -> None:
    for pod in pods:
        live, ready = pod.container["livenessProbe"], pod.container["readinessProbe"]
        assert (live["periodSeconds"], live["timeoutSeconds"]) == (30, 10)
        assert (ready["periodSeconds"], ready["timeoutSeconds"]) == (10, 5)
        assert live["httpGet"] == {"path": "/healthz", "port": "metrics"}
        assert ready["httpGet"]["path"] in PROBES
        assert ready["httpGet"]["port"] == "metrics"


def test_a_gateway_without_tls_is_probed_by_its_own_protocol() -> None:
    """Kubernetes does not probe gRPC with TLS, which both examples have."""
    (gateway,) = [one for one in of_kind(built("base"), "Deployment") if name_of(one) == "gateway-api"]
    (container,) = gateway["spec"]["template"]["spec"]["containers"]
    service = llm_pb2.DESCRIPTOR.services_by_name["LlmService"].full_name
    port = GatewaySettings.model_fields["port"].default
    assert container["readinessProbe"] == {
        "grpc": {"port": port, "service": service},
        "periodSeconds": 10,
        "timeoutSeconds": 5,
    }


def test_a_pod_outlives_the_grace_of_its_service(pods: list[Pod]) -> None:
    for pod in pods:
        kind = pod.settings()
        field = kind.model_fields.get("shutdown_grace")
        text = pod.environment.get(f"{kind.model_config.get('env_prefix')}SHUTDOWN_GRACE")
        if field is None:
            continue
        grace = timedelta(seconds=float(text.removeprefix("PT").removesuffix("S"))) if text else field.default
        assert pod.spec["terminationGracePeriodSeconds"] >= grace.total_seconds() + GRACE_MARGIN, pod.name


def test_a_pod_may_do_little_and_says_what_it_needs(pods: list[Pod]) -> None:
    versions = dict(re.findall(r'^(version) = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    stages = dockerfile(ROOT / "deploy" / "docker" / "Dockerfile")
    for pod in pods:
        assert pod.spec["securityContext"]["runAsNonRoot"] is True
        assert pod.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod.spec["automountServiceAccountToken"] is False
        own = pod.container["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"mountPath": "/tmp", "name": "tmp"} in pod.container["volumeMounts"]
        resources = pod.container["resources"]
        assert resources["requests"].keys() >= {"cpu", "memory"}
        if pod.service == "trainer":
            assert pod.environment["TRAINER_THREADS"] == resources["requests"]["cpu"]
        assert "memory" in resources["limits"]
        repository, _, tag = pod.container["image"].partition(":")
        assert tag == versions["version"]
        stage = stages[repository.removeprefix("durable-llm/")]
        assert pod.spec["securityContext"]["runAsUser"] == int(str(stage["USER"]).partition(":")[0])
        assert f"services.{pod.service}" in stage["ENTRYPOINT"]


def test_every_name_and_selector_finds_something(objects: tuple[dict[str, Any], ...], pods: list[Pod]) -> None:
    labels = {pod.name: pod.labels for pod in pods}
    for one in of_kind(objects, "Deployment"):
        assert selects(one["spec"]["selector"], labels[name_of(one)])
        others = [name for name, own in labels.items() if selects(one["spec"]["selector"], own)]
        assert others == [name_of(one)], "two Deployments share pods"
    for pod in pods:
        for spread in pod.spec["topologySpreadConstraints"]:
            assert selects(spread["labelSelector"], pod.labels)
    for one in of_kind(objects, "Service"):
        chosen = [pod for pod in pods if selects({"matchLabels": one["spec"]["selector"]}, pod.labels)]
        assert chosen, name_of(one)
        for port in one["spec"]["ports"]:
            assert all(port["targetPort"] in pod.ports for pod in chosen)
    budgets = [one["spec"]["selector"] for one in of_kind(objects, "PodDisruptionBudget")]
    assert all(any(selects(one, pod.labels) for pod in pods) for one in budgets)
    alone = {pod.name for pod in pods if not any(selects(one, pod.labels) for one in budgets)}
    assert alone == {"codec", "trainer"}, "of which there is one, and which nobody waits for"
    for one in of_kind(objects, "NetworkPolicy"):
        assert [pod for pod in pods if selects(one["spec"]["podSelector"], pod.labels)], name_of(one)
    for one in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        assert one["spec"]["scaleTargetRef"]["name"] in {name_of(other) for other in of_kind(objects, "Deployment")}
    (monitor,) = of_kind(objects, "ServiceMonitor")
    services = [one for one in of_kind(objects, "Service") if selects(monitor["spec"]["selector"], labels_of(one))]
    assert [port["name"] for one in services for port in one["spec"]["ports"]] == [
        endpoint["port"] for endpoint in monitor["spec"]["endpoints"]
    ]
    assert all(pod.labels["app.kubernetes.io/part-of"] == "durable-llm" for pod in pods), "no metrics of it"
    # Alerts and dashboard go by the job's name, which Compose gives, too.
    (relabeling,) = monitor["spec"]["endpoints"][0]["relabelings"]
    component = "__meta_kubernetes_pod_label_app_kubernetes_io_component"
    assert relabeling == {"sourceLabels": [component], "targetLabel": "job"}
    scraped = yaml.safe_load((ROOT / "deploy" / "compose" / "prometheus.yml").read_text())["scrape_configs"]
    jobs = {job["job_name"] for job in scraped}
    assert {pod.labels["app.kubernetes.io/component"] for pod in pods} == jobs - {"temporal"}
    issuers = {name_of(one) for one in of_kind(objects, "Issuer")}
    certificates = {one["spec"]["secretName"]: one["spec"] for one in of_kind(objects, "Certificate")}
    assert {one["issuerRef"]["name"] for one in certificates.values()} == issuers
    held = {v["secret"]["secretName"] for pod in pods for v in pod.spec["volumes"] if "secret" in v}
    signing = {one["spec"]["ca"]["secretName"] for one in of_kind(objects, "Issuer") if "ca" in one["spec"]}
    assert certificates.keys() <= held | signing
    (front,) = [pod for pod in pods if pod.service == "http"]
    called = front.environment["HTTP_GATEWAY"].rpartition("/")[2].partition(":")[0]
    assert called in certificates["gateway-tls"]["dnsNames"]
    page = (ROOT / "docs" / "kubernetes.md").read_text()
    assert not [name for name in SECRETS if f"`{name}`" not in page]


def test_what_reads_payloads_has_the_keys(objects: tuple[dict[str, Any], ...], pods: list[Pod]) -> None:
    encrypts = "encryption-keys" in map(name_of, of_kind(objects, "PersistentVolumeClaim"))
    assert encrypts == (objects == built(VERSIONED))
    reading = {pod.name for pod in pods if EncryptionSettings in SETTINGS[pod.service]}
    assert {pod.service for pod in pods if pod.name not in reading} == {"http"}
    assert {pod.name for pod in pods if "ENCRYPTION_KEY_STORE" in pod.environment} == (reading if encrypts else set())
    for pod in pods:
        if "ENCRYPTION_KEY_STORE" in pod.environment:
            (mount,) = [one for one in pod.container["volumeMounts"] if one["name"] == "encryption-keys"]
            assert mount["mountPath"] == pod.environment["ENCRYPTION_KEY_STORE"]
            assert pod.environment["ENCRYPTION_KEYRING"] in pod.files


def test_the_volume_of_data_keys_is_made_a_key_store(tmp_path: Path) -> None:
    """By a Job that may do as little as the services, in their image, and that the next apply can replace."""
    assert not of_kind(built(EVERYTHING), "Job")
    (job,) = of_kind(built(VERSIONED), "Job")
    (gateway,) = [one for one in of_kind(built(VERSIONED), "Deployment") if name_of(one) == "gateway-api"]
    assert job["spec"]["ttlSecondsAfterFinished"] <= 60, "a Job that is still there cannot get another image"
    theirs, ours = (one["spec"]["template"]["spec"] for one in (gateway, job))
    (service,), (container,) = theirs["containers"], ours["containers"]
    assert ours["restartPolicy"] == "OnFailure"
    assert container["command"] == ["python", "-m", "encryption", "init"]
    for key in ("securityContext", "automountServiceAccountToken", "enableServiceLinks"):
        assert ours[key] == theirs[key]
    assert [container[key] for key in ("image", "securityContext")] == [
        service[key] for key in ("image", "securityContext")
    ]
    variables = [one for one in service["env"] if one["name"].startswith("ENCRYPTION_")]
    assert container["env"] == variables
    names = {"encryption-keys", "encryption", "tmp"}
    for key, of in (("volumes", (ours, theirs)), ("volumeMounts", (container, service))):
        mine, all_of_them = ({one["name"]: one for one in each[key]} for each in of)
        assert mine == {name: all_of_them[name] for name in names}
    assert dict(mounted(ours, container, tmp_path)).keys() >= {"/run/secrets/encryption/keyring.json"}
    assert container["resources"].keys() == {"requests", "limits"}


def labels_of(one: dict[str, Any]) -> dict[str, str]:
    return dict(one["metadata"].get("labels", {}))


Way = tuple[str, int]
"""A peer and its port. The peer is a namespace, an app in this namespace, or `world` and `public`."""


def calls(pod: Pod, objects: tuple[dict[str, Any], ...]) -> Iterator[Way]:
    """Yield what a service is told to call, with DNS, and the receivers of webhooks."""
    yield "namespace kube-system", 53
    addressed = ("TEMPORAL_ADDRESS", "HTTP_GATEWAY", "FEED_URL", "OTEL_EXPORTER_OTLP_ENDPOINT")
    for value in (pod.environment[name] for name in addressed if name in pod.environment):
        host, _, port = value.rpartition("/")[2].rpartition(":")
        name, _, namespace = host.partition(".")
        own = [one["spec"]["selector"] for one in of_kind(objects, "Service") if name_of(one) == name]
        yield f"namespace {namespace}" if namespace else f"app {own[0][NAME]}", int(port)
    if "STORE_URL" in pod.environment:
        yield "world", 443
    if pod.service == "notifier":
        yield "public", 443


def called_by(pod: Pod) -> Iterator[Way]:
    """Yield who calls a service: the namespace is known by its name, or by its label."""
    yield "namespace monitoring", pod.ports["metrics"]
    match pod.labels[NAME]:
        case "gateway-api":
            yield "app http", pod.ports["grpc"]
            yield "namespaces that call the gateway", pod.ports["grpc"]
        case "http" | "codec" as name:
            yield "ingress", pod.ports[name]


def let_through(pod: Pod, policies: list[dict[str, Any]], way: str) -> set[Way]:
    peer_of = {"ingress": "from", "egress": "to"}[way]
    rules = [rule for policy in policies if selects(policy["podSelector"], pod.labels) for rule in policy.get(way, ())]
    return {(peer(one), port["port"]) for rule in rules for one in rule[peer_of] for port in rule["ports"]}


def peer(one: dict[str, Any]) -> str:
    """Return the name of the one whom a rule lets through. Raises KeyError for one that this file does not know."""
    if "ipBlock" in one:
        assert one["ipBlock"]["cidr"] == "0.0.0.0/0"
        assert "169.254.0.0/16" in one["ipBlock"]["except"], "a cloud's metadata"
        private = {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"}
        return "public" if private <= set(one["ipBlock"]["except"]) else "world"
    ((kind, selector),) = one.items()
    ((label, value),) = selector["matchLabels"].items()
    return {
        ("podSelector", NAME): f"app {value}",
        ("namespaceSelector", "kubernetes.io/metadata.name"): f"namespace {value}",
        ("namespaceSelector", "durable-llm/calls-the-gateway"): "namespaces that call the gateway",
        ("namespaceSelector", "durable-llm/ingress"): "ingress",
    }[kind, label]


def test_who_calls_is_let_through_and_nobody_else(objects: tuple[dict[str, Any], ...], pods: list[Pod]) -> None:
    """A port on which a pod does not listen is not reached, whoever may reach it."""
    policies = [one["spec"] for one in of_kind(objects, "NetworkPolicy")]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies, "nothing is refused"
    for pod in pods:
        assert let_through(pod, policies, "egress") == set(calls(pod, objects)), pod.name
        entered = {way for way in let_through(pod, policies, "ingress") if way[1] in pod.ports.values()}
        assert entered == set(called_by(pod)), pod.name


def test_each_queue_has_its_workers_and_its_scaler(objects: tuple[dict[str, Any], ...], pods: list[Pod]) -> None:
    workers = {pod.name: pod.environment for pod in pods if pod.service == "gpu_worker"}
    served = {(one["GPU_WORKER_MODEL"], one["GPU_WORKER_TASK_QUEUE"]) for one in workers.values()}
    for pod in pods:
        if pod.service == "gateway":
            default = GatewaySettings.model_fields["models"].default[0].queue
            models = json.loads(pod.environment["GATEWAY_MODELS"])
            assert {(model["name"], model.get("queue", default)) for model in models} == served
    scalers = {name_of(one): one["spec"] for one in of_kind(objects, "ScaledObject")}
    queues = {
        name: [t["metadata"]["taskQueue"] for t in one["triggers"] if t["type"] == "temporal"]
        for name, one in scalers.items()
    }
    types = {
        t["metadata"]["taskQueue"]: t["metadata"]["queueTypes"]
        for one in scalers.values()
        for t in one["triggers"]
        if t["type"] == "temporal"
    }
    for name, environment in workers.items():
        queue = environment["GPU_WORKER_TASK_QUEUE"]
        assert queues[name] == [queue, queue + BACKGROUND_QUEUE_SUFFIX]
        assert scalers[name]["maxReplicaCount"] > scalers[name]["minReplicaCount"] > 0
        # A backlog does not count what runs.
        added = scalers[name]["advanced"]["scalingModifiers"]["formula"].split(" + ")
        assert added == [t["name"] for t in scalers[name]["triggers"]] == ["waiting", "background", "running"]
        assert scalers[name]["advanced"]["scalingModifiers"]["target"] == environment["GPU_WORKER_MAX_CONCURRENT"]
        (running,) = [t["metadata"]["query"] for t in scalers[name]["triggers"] if t["type"] == "prometheus"]
        assert f'"{environment["GPU_WORKER_MODEL"]}"' in running
    notify = NotifierSettings.model_fields["task_queue"].default
    assert queues["notifier"] == [notify, notify + names.PROGRESS_QUEUE_SUFFIX]
    own = GatewaySettings.model_fields["workflow_queue"].default
    suffixes = ("", names.BATCH_STEPS_QUEUE_SUFFIX, names.WATCHED_QUEUE_SUFFIX)
    assert queues.get("gateway-workflows", [own + suffix for suffix in suffixes]) == [
        own + suffix for suffix in suffixes
    ]
    assert types == {queue: "workflow,activity" if queue == own else "activity" for queue in types}
    assert scalers.keys() >= {*workers, "notifier"}
    addresses = {pod.environment["TEMPORAL_ADDRESS"] for pod in pods if "TEMPORAL_ADDRESS" in pod.environment}
    endpoints = {
        t["metadata"]["endpoint"] for one in scalers.values() for t in one["triggers"] if t["type"] == "temporal"
    }
    assert endpoints == addresses


def test_versions_have_the_pods_of_what_they_replace() -> None:
    """And the controller connects as they do."""
    (versioned,) = of_kind(built(VERSIONED), "WorkerDeployment")
    (plain,) = [one for one in of_kind(built(EVERYTHING), "Deployment") if name_of(one) == "gateway-workflows"]
    ours, theirs = (one["spec"]["template"]["spec"]["containers"][0] for one in (plain, versioned))
    # The example with versions has encryption, too.
    theirs = {**theirs, "env": [one for one in theirs["env"] if not one["name"].startswith("ENCRYPTION_")]}
    assert {key: ours[key] for key in ("image", "env", "resources", "livenessProbe")} == {
        key: theirs[key] for key in ("image", "env", "resources", "livenessProbe")
    }
    (connection,) = of_kind(built(VERSIONED), "Connection")
    options = versioned["spec"]["workerOptions"]
    assert name_of(connection) == options["connectionRef"]["name"]
    settings = dict(line.split("=", 1) for line in TEMPORAL.read_text().splitlines() if line[0] != "#")
    address, namespace = settings["TEMPORAL_ADDRESS"], settings["TEMPORAL_NAMESPACE"]
    assert (connection["spec"]["hostPort"], options["temporalNamespace"]) == (address, namespace)
    (scaling,) = of_kind(built(VERSIONED), "WorkerResourceTemplate")
    assert scaling["spec"]["workerDeploymentRef"]["name"] == name_of(versioned)
    assert not [one for one in of_kind(built(VERSIONED), "Deployment") if name_of(one) == "gateway-workflows"]


def test_the_alerts_are_those_of_observability() -> None:
    """`make settings` writes them."""
    (rule,) = of_kind(built(EVERYTHING), "PrometheusRule")
    alerts = yaml.safe_load((ROOT / "deploy" / "observability" / "alerts.yml").read_text())
    assert rule["spec"] == alerts


def test_the_alert_of_a_process_that_is_down_knows_the_jobs_of_every_deployment() -> None:
    """And no other: a Prometheus may have targets of others."""
    alerts = yaml.safe_load((ROOT / "deploy" / "observability" / "alerts.yml").read_text())["groups"]
    (down,) = (rule for group in alerts for rule in group["rules"] if rule["alert"] == "ProcessIsDown")
    (known,) = re.fullmatch(r'up\{job=~"(.+)"\} == 0', down["expr"]).groups()  # type: ignore[union-attr]
    jobs = {
        job["job_name"]
        for place in ("compose/prometheus.yml", "observability/prometheus.yml", "observability/prometheus-secured.yml")
        for job in yaml.safe_load((ROOT / "deploy" / place).read_text())["scrape_configs"]
    }
    components = {
        labels["app.kubernetes.io/component"]
        for example in (EVERYTHING, VERSIONED)
        for kind in ("Deployment", "WorkerDeployment")
        for one in of_kind(built(example), kind)
        for labels in [one["spec"]["template"]["metadata"]["labels"]]
    }
    # Temporal's chart has a job for each of its services.
    for job in (*jobs, *components, "temporal-frontend-headless"):
        assert re.fullmatch(known, job), job
    assert not re.fullmatch(known, "somebody-else")


def test_the_servers_have_what_the_suite_asks_for() -> None:
    temporal, nats = (yaml.safe_load((FOLDER / "helm" / f"{name}.yaml").read_text()) for name in ("temporal", "nats"))
    dynamic = yaml.safe_load((ROOT / "deploy" / "temporal" / "dynamic-config.yaml").read_text())
    assert temporal["server"]["dynamicConfig"] == dynamic
    shards = temporal["server"]["config"]["persistence"]["numHistoryShards"]
    assert f" {shards} history shards," in (ROOT / "docs" / "scale.md").read_text()
    assert f"The Helm values have {shards}." in (ROOT / "docs" / "runbook.md").read_text()
    feed = (FOLDER / "base" / "settings" / "feed.env").read_text()
    assert f"FEED_REPLICAS={nats['config']['cluster']['replicas']}\n" in feed
