"""The codec server's audit log: a line of the process's log for each request that decrypts, or that is refused.

It holds who, whose payloads and how many, and no content. What the caller has made up is not repeated.
"""

import logging
from typing import Any, Final

from runtime.auth import Caller, Refusal
from services.codec.operators import Work

_log = logging.getLogger(__name__)
_METHODS: Final = ("decode", "encode")


def allowed(work: Work) -> None:
    """Record what was decrypted, encrypted and withheld; nothing where there was nothing of it."""
    if not (work.decrypted or work.encrypted or work.withheld):
        return
    counts = {"decrypted": dict(work.decrypted), "encrypted": dict(work.encrypted), "withheld": work.withheld}
    decision = "allowed" if work.decrypted or work.encrypted else "refused"
    _record(decision, work.operator.caller, {name: count for name, count in counts.items() if count})


def refused(method: str, caller: Caller | None, refusal: Refusal) -> None:
    """Record a request that was refused. `caller` is None for one whose credential does not count."""
    method = method if method in _METHODS else "other"
    _record("refused", caller, {"method": method, "code": refusal.code.name, "reason": refusal.reason})


def _record(decision: str, caller: Caller | None, about: dict[str, Any]) -> None:
    who = {"tenant": caller.tenant, "subject": caller.subject, "key_id": caller.key_id} if caller is not None else {}
    _log.info("audit", extra={"decision": decision, **{name: text for name, text in who.items() if text}, **about})
