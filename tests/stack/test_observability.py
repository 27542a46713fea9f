"""deploy/observability queries metrics that exist, in a real Prometheus that scrapes real processes after real jobs."""

import asyncio
import json
import re
import shutil
import urllib.parse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from google.protobuf.wrappers_pb2 import StringValue

from deploy.local.ports import free_port
from deploy.local.process_specs import METRICS, OPTIONAL
from deploy.local.settings import StackSettings
from deploy.local.stack import Stack
from llm_pb import llm_pb2
from llm_pb.batch_pb2_grpc import BatchServiceStub
from llm_pb.file_pb2_grpc import FileServiceStub
from llm_pb.llm_pb2_grpc import LlmServiceStub
from llm_pb.pipeline_pb2_grpc import PipelineServiceStub
from llm_pb.schedule_pb2_grpc import ScheduleServiceStub
from tests.support import batches, pipelines
from tests.support.certificates import Authority
from tests.support.credentials import KeyFile
from tests.support.jobs import new_job, run_job, webhook
from tests.support.lists import until_lists_are_refused
from tests.support.paths import ROOT
from tests.support.pipelines import WITH_PIPELINES
from tests.support.receivers import Receiver
from tests.support.schedules import create, ended, new_schedule, trigger, until
from tests.support.scrapes import Scrape, get, measured_stack, scrape_until

FOLDER = ROOT / "deploy" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "llm-jobs.json").read_text())
CONFIG = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
SECURED = yaml.safe_load((FOLDER / "prometheus-secured.yml").read_text())
COLLECTOR = yaml.safe_load((FOLDER / "otel-collector.yaml").read_text())
ALERTS = yaml.safe_load((FOLDER / "alerts.yml").read_text())

WORDS = {"and", "or", "unless", "bool", "offset"}
CLAUSE = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
MADE_BY_PROMETHEUS = {"up"}
CANARY = {"interval": "PT5M", "models": ["docstrings"]}


def program(name: str) -> str:
    """Return the path of a program of Prometheus, from `make tools` or else from PATH."""
    found = shutil.which(name, path=str(ROOT / ".tools" / "usr" / "bin")) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: `make tools`")
    return found


def queries() -> dict[str, str]:
    """Return every query of the dashboard by its panel's title and its reference letter."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }


def rules() -> dict[str, str]:
    """Return the expression of every alert."""
    return {rule["alert"]: rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]}


def metrics_in(query: str) -> set[str]:
    """Return the names in a PromQL query that are no function, label or keyword: those of metrics."""
    bare = CLAUSE.sub("", re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", "", query))
    return {name for name in re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare) if name not in WORDS}


def test_names_are_found_in_a_query() -> None:
    assert metrics_in('sum by (a) (rate(b_total{c="d"}[5m])) / e unless on (f) g{h=~"i|j"} > 0.5') == {
        "b_total",
        "e",
        "g",
    }


@pytest.fixture(scope="module")
async def measured(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> AsyncIterator[Stack]:
    """Run a stack with ended jobs of every outcome, one successful delivery, and one job that waits for a worker.

    A batch, a pipeline, a schedule and a canary have ended, too, a tenant has quotas, and Temporal has refused a count.
    """
    settings = {
        "GATEWAY_CANARY": json.dumps(CANARY),
        "GATEWAY_TENANTS": '{"acme": {"max_open_jobs": 2}}',
        "PYTHONPATH": WITH_PIPELINES["gateway"]["PYTHONPATH"],
    }
    async with measured_stack(tmp_path_factory.mktemp("observed"), **settings) as stack:
        async with grpc.aio.insecure_channel(stack.address("gateway")) as channel:
            client = LlmServiceStub(channel)
            job = new_job(params={"max_tokens": 1}, notify=webhook(f"{receiver.url}/observed"))
            await run_job(client, job)
            await client.Submit(llm_pb2.SubmitRequest(job=new_job(model="idle")))
            stubs = batches.Stubs(FileServiceStub(channel), BatchServiceStub(channel))
            await stubs.end((await batches.create(stubs, batches.lines_of(1, model="docstrings"))).batch_id)
            of_pipelines = PipelineServiceStub(channel)
            made = await pipelines.submit(of_pipelines, pipelines.new_pipeline("deep", StringValue(value="one")))
            assert (await pipelines.follow(of_pipelines, made.pipeline_id)).ended
            schedules: ScheduleServiceStub = ScheduleServiceStub(channel)
            for id_ in (await create(schedules, new_schedule()), "llmschedule-llm.canary-docstrings"):
                await trigger(schedules, id_)
                await until(schedules, id_, ended)
        await until_lists_are_refused(stack.address("temporal"))
        yield stack


@pytest.fixture(scope="module")
async def scraped(measured: Stack) -> Scrape:
    """Scrape all processes once Temporal has reported how many jobs wait, and batch and canary are counted."""

    def whole(found: Scrape) -> bool:
        waiting = found.total("approximate_backlog_count", task_type="Activity")
        ended = ("llm_batch_ended_total", "llm_canary_runs_total", "llm_pipeline_ended_total")
        return all((waiting, *map(found.total, ended)))

    return await scrape_until(measured, whole, *(METRICS.keys() - OPTIONAL))


@pytest.mark.parametrize("query", [*queries().values(), *rules().values()], ids=[*queries(), *rules()])
async def test_every_metric_asked_for_exists(scraped: Scrape, query: str) -> None:
    """This holds for the dashboard and the alerts."""
    # The parser gives each counter the name that OpenMetrics asks for. Temporal's have others.
    served = {name for sample in scraped.samples for name in (sample.name, sample.name.removesuffix("_total"))}
    served |= MADE_BY_PROMETHEUS
    assert metrics_in(query)
    assert not metrics_in(query) - served


async def test_the_variable_of_the_dashboard_exists(scraped: Scrape) -> None:
    (model,) = (variable for variable in DASHBOARD["templating"]["list"] if variable["name"] == "model")
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", model["definition"]).groups()  # type: ignore[union-attr]
    assert {("docstrings",), ("idle",)} <= scraped.by(metric, label).keys()


class Prometheus:
    """A running Prometheus."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def ask(self, query: str) -> list[Any]:
        """Return the result of a query: one item for each series."""
        url = f"http://{self._address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        found: list[Any] = json.loads(await get(url))["data"]["result"]
        return found


@pytest.fixture(scope="module")
async def prometheus(
    measured: Stack, scraped: Scrape, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Prometheus]:
    """Run Prometheus with this repository's configuration."""
    targets = {job["job_name"]: measured.metrics_url(job["job_name"]).split("/")[2] for job in CONFIG["scrape_configs"]}
    async with running_prometheus(tmp_path_factory.mktemp("prometheus"), CONFIG["scrape_configs"], targets) as running:
        yield running


@asynccontextmanager
async def running_prometheus(
    folder: Path, jobs: list[dict[str, Any]], targets: dict[str, str]
) -> AsyncIterator[Prometheus]:
    """Run Prometheus until each job was scraped three times, with other addresses and a shorter interval."""
    config: dict[str, Any] = {"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}}
    config["rule_files"] = [str(FOLDER / "alerts.yml")]
    config["scrape_configs"] = [{**job, "static_configs": [{"targets": [targets[job["job_name"]]]}]} for job in jobs]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            program("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    running = Prometheus(address)
    try:
        async with asyncio.timeout(120):
            while not await _has_scraped(running, len(jobs)):
                assert process.returncode is None, (folder / "log").read_text()
                await asyncio.sleep(0.2)
        yield running
    finally:
        process.terminate()
        await process.wait()


async def _has_scraped(prometheus: Prometheus, jobs: int) -> bool:
    try:
        return len(await prometheus.ask("sum_over_time(up[1m]) > 2 and up == 1")) == jobs
    except OSError:
        return False


async def test_every_query_of_the_dashboard_has_an_answer(prometheus: Prometheus) -> None:
    """A real Prometheus finds at least one series for each query, with the labels that the query names."""
    silent = []
    for title, query in queries().items():
        for variable, value in {"$__rate_interval": "1m", "$model": ".*"}.items():
            query = query.replace(variable, value)
        assert "$" not in query, title
        if not await prometheus.ask(query):
            silent.append((title, query))
    assert not silent


async def test_prometheus_takes_the_alerts(prometheus: Prometheus) -> None:
    """Prometheus evaluates all of them, and none fails."""
    counted = await prometheus.ask("sum(prometheus_rule_group_rules) or vector(0)")
    assert counted
    groups = json.loads(await get(f"http://{prometheus._address}/api/v1/rules"))["data"]["groups"]
    health = {rule["name"]: (rule["health"], rule.get("lastError")) for group in groups for rule in group["rules"]}
    assert health.keys() == rules().keys()
    assert {state for state, _ in health.values()} <= {"ok", "unknown"}, health


async def test_prometheus_scrapes_with_tls_and_a_key(stack: Stack, tmp_path: Path) -> None:
    """As its example says, whose files it finds next to itself."""
    ca, keys, secrets = Authority(tmp_path), KeyFile(tmp_path / "keys.json"), tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "metrics-key").write_text(keys.add(["admin:metrics"]) + "\n")
    (secrets / "ca.pem").write_bytes(ca.pem)
    tls = ca.issue("metrics").environment("CODEC_METRICS_TLS_")
    codec = stack.add("codec", {**tls, "CODEC_METRICS_API_KEYS_FILE": str(keys.path)})
    await codec.start()
    address = stack.metrics_url(codec.name).split("/")[2]
    (job,) = (job for job in SECURED["scrape_configs"] if job["job_name"] == "codec")
    async with running_prometheus(tmp_path, [job], {"codec": address}) as prometheus:
        assert await prometheus.ask('process_cpu_seconds_total{job="codec"}')
    await codec.terminate()


@pytest.mark.parametrize(
    "check",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "config", "--syntax-only", "prometheus-secured.yml"),
        ("test", "rules", "alerts.test.yml"),
    ],
)
async def test_promtool_finds_nothing_wrong(check: tuple[str, ...]) -> None:
    """promtool accepts the configuration, and the alerts fire as expected on test series."""
    process = await asyncio.create_subprocess_exec(
        program("promtool"), *check, cwd=FOLDER, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((FOLDER / "alerts.test.yml").read_text())["tests"]
    firing = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert firing == rules().keys()


def targets(jobs: list[dict[str, Any]]) -> dict[str, str]:
    """Return the only target of each scrape job."""
    found = {}
    for job in jobs:
        ((target,),) = (static["targets"] for static in job["static_configs"])
        found[job["job_name"]] = target
    return found


def test_the_ports_are_those_of_make_up() -> None:
    """Prometheus and the Collector scrape the ports on which `make up` serves."""
    ports = {
        kind: f"127.0.0.1:{StackSettings.model_fields[f'{field}_port'].default}"
        for kind, field in METRICS.items()
        if kind not in OPTIONAL
    }
    assert targets(CONFIG["scrape_configs"]) == targets(SECURED["scrape_configs"]) == ports
    services = {kind: port for kind, port in ports.items() if kind != "temporal"}
    assert targets(COLLECTOR["receivers"]["prometheus"]["config"]["scrape_configs"]) == services


def test_the_collectors_pipelines_use_what_is_defined() -> None:
    """Every component that a pipeline names is configured, and every one that is configured is used."""
    used: dict[str, set[str]] = {"extensions": set(COLLECTOR["service"]["extensions"])}
    for pipeline in COLLECTOR["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            used.setdefault(kind, set()).update(names)
    assert used == {kind: set(COLLECTOR[kind]) for kind in ("receivers", "processors", "exporters", "extensions")}


def test_grafana_finds_the_dashboard() -> None:
    """Panels have unique ids and lie in the grid. Their data source is the provisioned one."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in DASHBOARD["panels"])
    provisioned = yaml.safe_load((FOLDER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml").read_text())
    (source,) = provisioned["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == CONFIG["global"]["scrape_interval"]
