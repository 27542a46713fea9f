"""`make settings`: writes docs/settings.md from the settings classes."""

import json
from pathlib import Path
from typing import Final

from pydantic import SecretStr, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode

from deploy.local.settings import StackSettings
from encryption import EncryptionSettings
from feed.feed import FeedSettings
from runtime.log import LogSettings
from runtime.temporal import TemporalSettings
from services.codec.settings import CodecSettings
from services.gateway.settings import GatewaySettings
from services.gpu_worker.settings import GpuWorkerSettings
from services.http.settings import HttpSettings
from services.notifier.settings import NotifierSettings
from services.trainer.settings import TrainerSettings
from store.settings import StoreSettings

CLASSES: Final[tuple[type[BaseSettings], ...]] = (
    GatewaySettings,
    GpuWorkerSettings,
    NotifierSettings,
    TrainerSettings,
    HttpSettings,
    FeedSettings,
    EncryptionSettings,
    StoreSettings,
    LogSettings,
    TemporalSettings,
    CodecSettings,
    StackSettings,
)
PAGE: Final = Path(__file__).parents[1] / "docs" / "settings.md"
BEGIN: Final = "<!-- settings: written by `make settings` -->\n"
END: Final = "<!-- settings end -->\n"


def table() -> str:
    """Return the table in Markdown: a section for each class, a row for each variable."""
    lines: list[str] = []
    for settings in CLASSES:
        prefix = settings.model_config.get("env_prefix", "")
        lines += ["", f"## `{prefix}…`", "", (settings.__doc__ or "").splitlines()[0], ""]
        lines += ["| variable | default | meaning |", "|---|---|---|"]
        # A class's own settings before those that it shares with other classes.
        fields = sorted(settings.model_fields.items(), key=lambda item: item[0] not in settings.__annotations__)
        for name, field in fields:
            meaning = " ".join((field.description or "").split())
            lines.append(f"| `{prefix}{name.upper()}` | {_default(field)} | {meaning} |")
    return "\n".join(lines[1:]) + "\n"


def with_table(page: str) -> str:
    """Return the page with its table replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    text = TypeAdapter(type(value)).dump_python(value, mode="json", exclude_none=True)
    if text is None or text in ("", []):
        return ""
    if isinstance(text, list) and text and isinstance(text[0], dict):
        return f"the model `{text[0]['name']}`"
    # pydantic-settings reads these as JSON, except where a class splits the text itself.
    if isinstance(text, list) and NoDecode in field.metadata:
        text = ",".join(map(str, text))
    if isinstance(text, list | dict):
        text = json.dumps(text)
    return f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
