"""Settings are described, listed in docs/settings.md, and safe by default."""

from typing import Literal, get_args, get_origin

import pytest
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from deploy.settings_table import CLASSES, PAGE, with_table
from runtime.environment import rename_variables, unknown_variables
from services.gateway.settings import GatewaySettings
from services.gpu_worker.settings import GpuWorkerSettings
from services.notifier.settings import NotifierSettings


@pytest.mark.parametrize("settings", CLASSES, ids=lambda settings: settings.__name__)
def test_every_setting_is_described(settings: type[BaseSettings]) -> None:
    assert all(field.description for field in settings.model_fields.values())
    assert settings.model_config["frozen"], "settings are immutable"


def test_the_page_holds_the_table() -> None:
    """`make settings` writes the table."""
    text = PAGE.read_text()
    assert text == with_table(text)


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
    ("settings", "name", "longest"),
    [
        (GatewaySettings, "GATEWAY_WORKFLOW_QUEUE", 255),
        (GatewaySettings, "GATEWAY_NOTIFY_QUEUE", 246),
        (NotifierSettings, "NOTIFIER_TASK_QUEUE", 246),
        (GpuWorkerSettings, "GPU_WORKER_TASK_QUEUE", 255),
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
    # Without it a gateway takes no other address than loopback.
    monkeypatch.setenv("GATEWAY_ALLOW_ANONYMOUS", "true")
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
