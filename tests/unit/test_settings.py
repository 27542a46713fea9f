"""Settings are described, listed in docs/settings.md, and safe by default."""

import json
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import ValidationError
from pydantic_settings import BaseSettings
from pydantic_settings.exceptions import SettingsError

from deploy.local.settings import StackSettings
from deploy.settings_table import CLASSES, PAGE, with_table
from encryption.settings import EncryptionSettings
from feed.feed import FeedSettings
from jobs.classes import NAMES
from runtime.audit_file import AuditFile
from runtime.auth_keys import KeysFile
from runtime.environment import (
    WrongSetting,
    read_variable_files,
    rename_variables,
    setting_problems,
    unknown_variables,
)
from runtime.files import ReadableFile
from runtime.temporal import TemporalSettings, connect
from services.gateway.settings import GatewaySettings
from services.gpu_worker.settings import GpuWorkerSettings
from services.http.settings import HttpSettings
from services.notifier.settings import NotifierSettings
from store.settings import StoreSettings


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: settings.__name__)
def test_every_setting_is_described(settings: type[BaseSettings]) -> None:
    assert all(field.description for field in settings.model_fields.values())
    assert settings.model_config["frozen"], "settings are immutable"


def test_the_page_holds_the_table() -> None:
    """`make settings` writes the table."""
    text = PAGE.read_text()
    assert text == with_table(text)


def _priced(currency: str) -> str:
    price = {"currency": currency, "prompt_per_million": "1", "output_per_million": "1"}
    model = {"name": "m", "context_tokens": 9, "max_output_tokens": 9, "default_max_tokens": 9, "price": price}
    return json.dumps([model])


LISTS = [
    (settings, name)
    for settings in CLASSES
    for name, field in settings.model_fields.items()
    if isinstance(field.default, tuple) and field.default and name != "models"
]


@pytest.mark.parametrize(("settings", "name"), LISTS, ids=lambda item: getattr(item, "__name__", item))
def test_the_page_shows_a_list_as_its_variable_takes_it(
    settings: type[BaseSettings], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = f"{settings.model_config.get('env_prefix', '')}{name}".upper()
    (row,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{variable}` |"))
    monkeypatch.setenv(variable, row.split("|")[2].strip(" `"))
    assert getattr(settings(), name) == settings.model_fields[name].default


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: settings.__name__)
def test_listeners_bind_to_loopback(settings: type[BaseSettings]) -> None:
    hosts = [field for name, field in settings.model_fields.items() if name == "host" or name.endswith("_host")]
    assert all(field.default == "127.0.0.1" for field in hosts)


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (GatewaySettings, "GATEWAY_PAGE_TOKEN_KEY", "hush-hush"),
        (NotifierSettings, "NOTIFIER_WEBHOOK_SECRETS", '["hush-hush"]'),
        (NotifierSettings, "NOTIFIER_USERS", '{"u": {"secrets": ["hush-hush"]}}'),
        (NotifierSettings, "NOTIFIER_USERS", '{"u": {"url": ["hush-hush"]}}'),
    ],
)
def test_a_secret_that_is_refused_is_not_shown(
    settings: type[BaseSettings], name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is written to the log of the process."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as error:
        settings()
    assert "hush" not in str(error.value)
    assert name.partition("_")[2].lower() in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("GATEWAY_AUDIT", "", "must have at least 1 character"),
        ("GATEWAY_PAGE_TOKEN_KEY", "short", "must have at least 16 characters"),
        ("GATEWAY_CANARY", "", "is no JSON object"),
        ("GATEWAY_CANARY", '{"interval": ', "is no JSON object"),
    ],
)
def test_a_problem_of_a_setting_is_in_words_of_settings(
    name: str, value: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in pydantic's, which speaks of items and instances."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as error:
        GatewaySettings()
    assert setting_problems(error.value, [GatewaySettings]) == [f"{name}: {problem}"]


def patterns(schema: Any) -> list[str]:
    """Return the patterns of texts in a schema of pydantic's core."""
    match schema:
        case {"type": "str", "pattern": pattern}:
            return [pattern]
        case dict():
            return [found for one in schema.values() for found in patterns(one)]
        case list() | tuple():
            return [found for one in schema for found in patterns(one)]
    return []


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: settings.__name__)
def test_no_setting_has_a_bare_pattern(settings: type[BaseSettings]) -> None:
    """pydantic would show it to the operator."""
    assert not patterns(settings.__pydantic_core_schema__)


BAD = ["-1", "1" * 250, "[]", "{}", '["?!"]', "[{}]", '{"?!": "?!"}', '{"?!": {}}']
OF_PYTHON = re.compile(
    r"\b(pattern|Input|String|Tuple|timedelta|tuple|dictionary|valid|Value error|instance|unable)\b|\^"
)


def refusals(settings: type[BaseSettings]) -> list[str]:
    """Return what is wrong with the environment, in plain words: none of pydantic's or Python's."""
    try:
        settings()
    except (ValidationError, SettingsError) as error:
        lines = setting_problems(error, [settings])
    else:
        return []
    messages = [line.partition(": ")[2] for line in lines]
    assert not [text for text in messages if OF_PYTHON.search(text) or not text]
    return lines


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: settings.__name__)
def test_a_value_that_is_refused_is_refused_in_plain_words(
    settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{settings.model_config['env_prefix']}{field}".upper() for field in settings.model_fields]
    for name in names:
        monkeypatch.setenv(name, "!?")
        lines = refusals(settings)
        assert not lines or any(name in line for line in lines)
        monkeypatch.delenv(name)
    for value in BAD:
        for name in names:
            monkeypatch.setenv(name, value)
        assert refusals(settings)


def test_a_key_of_kms_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "botocore", None)
    monkeypatch.setenv("ENCRYPTION_KMS_KEY", "arn:aws:kms:eu-central-1:1:key/a")
    monkeypatch.setenv("ENCRYPTION_KEY_STORE", "/keys")
    with pytest.raises(ValidationError) as error:
        EncryptionSettings()
    (problem,) = setting_problems(error.value, [EncryptionSettings])
    assert problem == "ENCRYPTION_KMS_KEY: needs the extra kms, which is not installed"


@pytest.mark.parametrize(
    ("name", "value", "package", "extra"),
    [
        ("NOTIFIER_NATS_URL", "nats://x:4222", "nats", "nats"),
        ("NOTIFIER_KAFKA_SERVERS", "x:9092", "aiokafka", "kafka"),
        ("NOTIFIER_POSTGRES_URL", "postgresql://u@x/d", "asyncpg", "postgres"),
    ],
)
def test_a_sink_names_the_extra_that_is_missing(
    name: str, value: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as error:
        NotifierSettings()
    (problem,) = setting_problems(error.value, [NotifierSettings])
    assert problem == f"{name}: needs the extra {extra}, which is not installed"


@pytest.mark.parametrize(
    ("settings", "name", "bad", "good", "form"),
    [
        (
            FeedSettings,
            "FEED_URL",
            ["", "zz", "http://x", "nats://", "nats://x,http://y", "nats://x,nats://"],
            ["nats://u:p@x:4222", "tls://x", "nats://x,nats://u:p,w@y:4222"],
            "nats://host",
        ),
        (FeedSettings, "FEED_URL", ["nats://x,tls://y"], [], "one scheme"),
        (FeedSettings, "FEED_REPLICAS", ["0", "6"], ["1", "3"], ""),
        (FeedSettings, "FEED_MAX_READERS", ["0", "-1"], ["1", "1000000"], ""),
        (TemporalSettings, "TEMPORAL_DEPLOYMENT_NAME", ["a.b", "a:b"], [], "no dot and no colon"),
        (GpuWorkerSettings, "GPU_WORKER_MODEL_TENANT", ["-a", "a/b"], ["", "a-1"], "1 to 32 of"),
        (NotifierSettings, "NOTIFIER_POSTGRES_TABLES", ['["1a"]', '["A"]'], ["[]", '["a_1"]'], "1 to 50 of"),
        (HttpSettings, "HTTP_CONSOLE_DOCS_URL", ["x", "ftp://x", "https://x y"], ["", "https://x/#y"], "http://"),
        (HttpSettings, "HTTP_CONSOLE_TRACE_URL", ["x", "https://x/{job}"], ["", "https://x/{trace_id}"], "{trace_id}"),
        (StoreSettings, "STORE_ENDPOINT", ["", "x", "http://u:p@x"], ["http://x:9000/s3"], "without user and password"),
        (EncryptionSettings, "ENCRYPTION_KMS_KEY", ["", "key", "arn:aws:s3:::x"], [], "arn:aws:kms:"),
        (GatewaySettings, "GATEWAY_MODELS", [_priced("E1")], [_priced("EUR")], "1 to 16 letters"),
        (
            GatewaySettings,
            "GATEWAY_CLASSES",
            ['{"URGENT": {}}', '{"HIGH": {"seats": 1}}', '{"HIGH": {"weight": 0}}', '{"HIGH": {"rate": 0}}'],
            ["{}", '{"HIGH": {}}', '{"STANDARD": {"rate": 50}, "SCHEDULED": {"queue_timeout": "PT6H"}}'],
            "",
        ),
        (FeedSettings, "FEED_STREAM", ["", "a b", "a.b", "a>"], ["A_b-1"], "the name of a stream"),
        (FeedSettings, "FEED_SUBJECT_PREFIX", ["", ">", "a..b", ".a", "a b"], ["a", "a.b"], "joined by single dots"),
        (NotifierSettings, "NOTIFIER_NATS_URL", ["zz", "", "http://x"], ["nats://x:4222"], "nats://host:port"),
        (NotifierSettings, "NOTIFIER_NATS_SUBJECT_PREFIX", ["*", ""], ["llm.events"], "joined by single dots"),
        (NotifierSettings, "NOTIFIER_DEFAULT_WEBHOOK_URL", ["foo", "ftp://x", "http://"], ["http://10.1.1.1/"], "URL"),
        (NotifierSettings, "NOTIFIER_USERS", ['{"u": {"url": "foo"}}'], ['{"u": {"url": "https://x/"}}'], "URL must"),
        (NotifierSettings, "NOTIFIER_WEBHOOK_SCHEMES", ['["ftp"]', "[]"], ['["http"]'], "'https'|at least 1"),
        (NotifierSettings, "NOTIFIER_WEBHOOK_PORTS", ["[99999]", "[0]"], ["[]", "[8443]"], "than or equal to"),
        (NotifierSettings, "NOTIFIER_WEBHOOK_NETWORKS", ['["10.0.0.1/8"]', '["x"]'], ['["10.0.0.0/8"]'], "10.0.0.0/8"),
        (NotifierSettings, "NOTIFIER_WEBHOOK_PROXY", ["ftp://x", "x", "http://"], ["http://u:p@x:3128"], "http://host"),
        (
            NotifierSettings,
            "NOTIFIER_JOB_URL",
            ["nope", "https://x/", "x/{workflow_id}"],
            ["https://x/{workflow_id}"],
            "f",
        ),
        (
            NotifierSettings,
            "NOTIFIER_DNS_SERVERS",
            ['["x"]', '["1.2.3.4:x"]', '["1.2.3.4:99999"]', '["x:53"]', '["1.2.3.4/5"]', '[""]'],
            ['["1.2.3.4", "1.2.3.4:53", "::1", "[::1]:53"]'],
            "192.0.2.1:53",
        ),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_the_form(
    settings: type[BaseSettings],
    name: str,
    bad: list[str],
    good: list[str],
    form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process would start without it and fail later, where nobody looks for the setting."""
    for value in good:
        monkeypatch.setenv(name, value)
        settings()
    for value in bad:
        monkeypatch.setenv(name, value)
        with pytest.raises(ValidationError) as error:
            settings()
        problem, *_ = setting_problems(error.value, [settings])
        assert problem.startswith(name)
        assert re.search(form, problem)


@pytest.mark.parametrize(
    ("settings", "name", "longest"),
    [
        (GatewaySettings, "GATEWAY_WORKFLOW_QUEUE", 247),
        (GatewaySettings, "GATEWAY_NOTIFY_QUEUE", 246),
        (NotifierSettings, "NOTIFIER_TASK_QUEUE", 246),
        (GpuWorkerSettings, "GPU_WORKER_TASK_QUEUE", 244),
    ],
)
def test_a_queues_name_fits_temporals_tables(
    settings: type[BaseSettings], name: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name fits with its suffix. A workflow that schedules on a longer queue name fails again and again."""
    monkeypatch.setenv(name, "q" * longest)
    settings()
    for bad in ("q" * (longest + 1), ""):
        monkeypatch.setenv(name, bad)
        with pytest.raises(ValidationError):
            settings()


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: settings.__name__)
def test_a_setting_comes_from_the_environment(settings: type[BaseSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    # Without these a gateway, or the listener of metrics, takes no other address than loopback.
    for name in ("ALLOW_ANONYMOUS", "METRICS_ALLOW_ANONYMOUS"):
        monkeypatch.setenv(f"{settings.model_config['env_prefix']}{name}", "true")
    texts = {name: field.annotation for name, field in settings.model_fields.items()}
    name, kind = next((n, kind) for n, kind in texts.items() if kind in (str, bool) or get_origin(kind) is Literal)
    changed = {str: "changed", bool: "false"}.get(kind) or get_args(kind)[-1]
    monkeypatch.setenv(f"{settings.model_config['env_prefix']}{name}".upper(), changed)
    assert str(getattr(settings(), name)).lower() == changed.lower()


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ({"GATEWAY_NOTIFY_WITHIN": "PT1S"}, "PT1S"),
        ({"GATEWAY_NOTIFY_WITHIN": "PT1S", "GATEWAY_NOTIFY_MAX_DURATION": "PT2S"}, "PT2S"),
    ],
)
def test_a_setting_works_under_its_earlier_name_with_a_warning(given: dict[str, str], counts: str) -> None:
    environment = dict(given)
    (warning,) = rename_variables(environment, CLASSES)
    assert warning.startswith("GATEWAY_NOTIFY_WITHIN is called GATEWAY_NOTIFY_MAX_DURATION now")
    assert environment == {"GATEWAY_NOTIFY_MAX_DURATION": counts}
    assert not unknown_variables(environment, CLASSES)


def test_the_value_of_a_setting_may_be_in_a_file(tmp_path: Path) -> None:
    """Its variable has the suffix _FILE, and the newline at the file's end is no part of the value."""
    file = tmp_path / "page-token-key"
    file.write_text("hush hush hush hush\n")
    environment = {"GATEWAY_PAGE_TOKEN_KEY_FILE": str(file), "OTHER_FILE": "/nowhere"}
    assert not unknown_variables(environment, CLASSES)
    read_variable_files(environment, CLASSES)
    assert environment == {"GATEWAY_PAGE_TOKEN_KEY": "hush hush hush hush", "OTHER_FILE": "/nowhere"}


def test_a_setting_whose_own_name_ends_in_file_stays_a_path() -> None:
    environment = {"GATEWAY_API_KEYS_FILE": "/nowhere", "STORE_SECRET_ACCESS_KEY_FILE": "/nowhere"}
    read_variable_files(environment, CLASSES)
    assert set(environment) == {"GATEWAY_API_KEYS_FILE", "STORE_SECRET_ACCESS_KEY_FILE"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"FEED_URL_FILE": "/nowhere"}, "FEED_URL_FILE.*No such file"),
        ({"FEED_URL_FILE": "/nowhere", "FEED_URL": "hush"}, "FEED_URL and FEED_URL_FILE are both set"),
    ],
)
def test_a_file_of_a_setting_that_cannot_be_used_is_named(given: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        read_variable_files(given, CLASSES)
    assert "hush" not in str(error.value)


WRITTEN = {"ENCRYPTION_KEY_STORE", "ENCRYPTION_KEYRING", "CODEC_AUDIT", "TRAINER_WORK_DIR"}
"""Settings of a path that name no file which has to be there: folders, and files that we write."""


def files(settings: type[BaseSettings]) -> list[str]:
    """Return the variables of the settings that name a file to read."""
    kinds = (Path, ReadableFile, KeysFile)
    fields = [name for name, field in settings.model_fields.items() if {*get_args(field.annotation)} & {*kinds}]
    names = [f"{settings.model_config['env_prefix']}{field.upper()}" for field in fields]
    return [name for name in names if name not in WRITTEN]


FILES = [(settings, name) for settings in CLASSES for name in files(settings)]


def test_settings_of_every_kind_of_file_are_tried() -> None:
    names = {name for _, name in FILES}
    assert {"GATEWAY_API_KEYS_FILE", "GPU_WORKER_METRICS_API_KEYS_FILE", "HTTP_SESSION_KEY_FILE"} <= names
    assert {"GATEWAY_TLS_CERT", "FEED_NKEY_SEED", "STORE_SECRET_ACCESS_KEY_FILE", "NOTIFIER_POSTGRES_TLS_CA"} <= names


@pytest.mark.parametrize(("settings", "name"), [*FILES, (GatewaySettings, "GATEWAY_JWT_KEYS")], ids=str)
def test_a_setting_of_a_file_that_cannot_be_read_is_named_with_the_file(
    settings: type[BaseSettings], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before it serves anything."""
    for path in (Path("/nowhere/file"), tmp_path):
        monkeypatch.setenv(name, str(path))
        with pytest.raises(ValidationError) as error:
            settings()
        (problem,) = [line for line in setting_problems(error.value, [settings]) if line.startswith(f"{name}: ")]
        assert str(path) in problem


def test_a_file_of_keys_that_holds_none_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("{}")
    for name in ("GATEWAY_API_KEYS_FILE", "GATEWAY_METRICS_API_KEYS_FILE", "GATEWAY_JWT_KEYS"):
        monkeypatch.setenv(name, str(file))
    with pytest.raises(ValidationError) as error:
        GatewaySettings()
    problems = setting_problems(error.value, [GatewaySettings])
    assert [line.partition(":")[0] for line in problems] == [
        "GATEWAY_METRICS_API_KEYS_FILE",
        "GATEWAY_API_KEYS_FILE",
        "GATEWAY_JWT_KEYS",
    ]


async def test_a_file_that_is_no_setting_of_ours_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporal's own configuration names the files of its TLS. A file that a process writes is opened at the start."""
    monkeypatch.setenv("TEMPORAL_TLS_SERVER_CA_CERT_PATH", "/nowhere/ca.pem")
    nothing: Any = None
    with pytest.raises(WrongSetting, match=r"^TEMPORAL_TLS_…: /nowhere/ca\.pem cannot be read: No such file"):
        await connect(nothing, nothing)
    with pytest.raises(WrongSetting, match=r"^CODEC_AUDIT: the audit log /nowhere/log cannot be opened: No such file"):
        AuditFile(Path("/nowhere/log"), "CODEC_AUDIT")


def durations(settings: type[BaseSettings]) -> dict[str, str]:
    """Return the settings that are a time, and the unit of their value: as ISO 8601, or in seconds."""
    forms = {timedelta: "PT{}S", float: "{}"}
    return {
        name: forms[field.annotation]
        for name, field in settings.model_fields.items()
        if field.annotation is timedelta or (field.annotation is float and "in seconds" in (field.description or ""))
    }


DURATIONS = [(settings, name, form) for settings in CLASSES for name, form in durations(settings).items()]


def test_every_service_that_waits_has_durations() -> None:
    services = {settings for settings, _, _ in DURATIONS}
    assert {GatewaySettings, GpuWorkerSettings, NotifierSettings, FeedSettings, StackSettings} <= services


@pytest.mark.parametrize(("settings", "name", "form"), DURATIONS, ids=lambda value: getattr(value, "__name__", value))
def test_a_duration_of_zero_is_refused_or_explained(
    settings: type[BaseSettings], name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative one is refused."""
    variable = f"{settings.model_config['env_prefix']}{name}".upper()
    monkeypatch.setenv(variable, f"-{form.format(1)}")
    with pytest.raises(ValidationError, match="greater than"):
        settings()
    zero = form.format(0)
    monkeypatch.setenv(variable, zero)
    if f" {zero}: " in (settings.model_fields[name].description or "").replace("\n", " "):
        settings()
    else:
        with pytest.raises(ValidationError, match="greater than"):
            settings()


PRICE = {"currency": "EUR", "prompt_per_million": "0.15", "output_per_million": 0.6}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ([{}, {"queue": "another"}], "several models have the name 'm'"),
        ([{"default_max_tokens": 11}], "default_max_tokens of 'm' is above its max_output_tokens"),
        ([{"name": ""}], "name"),
        ([{"price": PRICE}, {"name": "n", "price": {**PRICE, "currency": "USD"}}], "must have one currency"),
        ([{"price": {**PRICE, "output_per_million": "-1"}}], "greater than or equal to 0"),
        ([{"price": {**PRICE, "output_per_million": "0.0000001"}}], "decimal places"),
        ([{"price": {"currency": "EUR"}}], "prompt_per_million"),
        ([{"queue": "q"}, {"name": "n", "queue": "q.background"}], "that of another model's background jobs"),
        ([{"queue": "q" * 245}], "at most 244 characters"),
    ],
)
def test_models_that_contradict_themselves_are_refused(
    changes: list[dict[str, object]], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"name": "m", "context_tokens": 20, "max_output_tokens": 10, "default_max_tokens": 5}
    monkeypatch.setenv("GATEWAY_MODELS", json.dumps([model]))
    GatewaySettings()
    monkeypatch.setenv("GATEWAY_MODELS", json.dumps([{**model, **change} for change in changes]))
    with pytest.raises(ValidationError, match=problem):
        GatewaySettings()


@pytest.mark.parametrize("variable", ["GATEWAY_NOTIFY_QUEUE", "GATEWAY_MODELS"])
def test_the_queue_of_workflows_is_no_other_queue(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """The gateway takes activities from it, so it would take those of notifiers or workers."""
    model = {"name": "m", "queue": "same", "context_tokens": 8, "max_output_tokens": 4, "default_max_tokens": 4}
    monkeypatch.setenv(variable, json.dumps([model]) if variable == "GATEWAY_MODELS" else "same")
    for queue in ("same", "same.background") if variable == "GATEWAY_MODELS" else ("same",):
        monkeypatch.setenv("GATEWAY_WORKFLOW_QUEUE", queue)
        with pytest.raises(ValidationError, match="must differ from GATEWAY_NOTIFY_QUEUE and from the models' queues"):
            GatewaySettings()


def test_what_the_settings_of_classes_leave_out_keeps_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """No default of a class is above the operator's maximum. A null is a value."""
    monkeypatch.setenv("GATEWAY_CLASSES", '{"HIGH": {"weight": 25}, "BACKGROUND": {"rate": null}}')
    monkeypatch.setenv("GATEWAY_MAX_TOTAL_TIMEOUT", "PT10H")
    monkeypatch.setenv("GATEWAY_QUEUE_TIMEOUT", "PT1M")
    settings = GatewaySettings()
    classes = settings.classes
    assert [classes.of(one).weight for one in NAMES] == [25, 50, 10, 5]
    assert [classes.turns(one) for one in NAMES] == [0.5, 1, 0.2, 0.1]
    assert [classes.of(one).rate for one in NAMES] == [100, None, None, None]
    assert [settings.queue_timeout_of(one) / timedelta(minutes=1) for one in NAMES] == [1, 1, 720, 720]
    assert [settings.total_timeout_of(one) / timedelta(hours=1) for one in NAMES] == [8, 8, 10, 10]
