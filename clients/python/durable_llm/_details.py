"""The details of a google.rpc.Status."""

from typing import NamedTuple

from google.rpc import error_details_pb2, status_pb2


class Violation(NamedTuple):
    """A field that breaks a rule."""

    field: str
    """The field's path in the request, such as job.params.stop[2]."""
    description: str
    """The rule that the field breaks."""


def reason_of(status: status_pb2.Status) -> str:
    """Return the reason in the ErrorInfo of a status. Empty without one."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason: str = info.reason
            return reason
    return ""
