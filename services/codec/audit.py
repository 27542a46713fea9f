"""The codec server's audit log: a record of each request that decrypts, or that is refused, before its answer.

It holds who, whose payloads and how many, and no content. What the caller has made up is not repeated.
"""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from opentelemetry.metrics import Counter

from runtime.audit import AuditLog, AuditUnavailable
from runtime.audit_file import AuditFile
from runtime.auth import Caller, Refusal
from services.codec.operators import Work

_log = logging.getLogger(__name__)
_METHODS: Final = ("decode", "encode")


@asynccontextmanager
async def recording(path: Path | None, lost: Counter) -> AsyncIterator[AuditLog | None]:
    """Yield the audit log in a file, None without one; store at the end what waits.

    `lost` counts the records that could not be stored. Raises WrongSetting when the file cannot be opened.
    """
    if path is None:
        yield None
        return
    log = AuditLog(AuditFile(path, "CODEC_AUDIT"), lost)
    try:
        yield log
    finally:
        await log.close()


class OperatorAudit:
    """Records in the log of the process, and in an audit log if there is one."""

    def __init__(self, log: AuditLog | None) -> None:
        self._records = log

    async def allowed(self, work: Work) -> None:
        """Record what was decrypted, encrypted and withheld; nothing where there was nothing of it.

        Raises AuditUnavailable: what was decrypted must not be shown.
        """
        if not (work.decrypted or work.encrypted or work.withheld):
            return
        counts = {"decrypted": dict(work.decrypted), "encrypted": dict(work.encrypted), "withheld": work.withheld}
        decision = "allowed" if work.decrypted or work.encrypted else "refused"
        await self._record(decision, work.operator.caller, {name: count for name, count in counts.items() if count})

    async def refused(self, method: str, caller: Caller | None, refusal: Refusal) -> None:
        """Record a request that was refused. `caller` is None for one whose credential does not count."""
        method = method if method in _METHODS else "other"
        try:
            await self._record(
                "refused", caller, {"method": method, "code": refusal.code.name, "reason": refusal.reason}
            )
        except AuditUnavailable as error:
            # A refusal is no less one.
            _log.warning("the record of a refusal is lost: %s", error)

    async def _record(self, decision: str, caller: Caller | None, about: dict[str, Any]) -> None:
        who = (
            {"tenant": caller.tenant, "subject": caller.subject, "key_id": caller.key_id} if caller is not None else {}
        )
        fields = {"decision": decision, **{name: text for name, text in who.items() if text}, **about}
        _log.info("audit", extra=fields)
        if self._records is not None:
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            await self._records.put(json.dumps({"time": time, **fields}).encode() + b"\n")
