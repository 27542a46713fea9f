"""The details of a google.rpc.Status."""

from google.rpc import error_details_pb2, status_pb2


def reason_of(status: status_pb2.Status) -> str:
    """Return the reason in the ErrorInfo of a status. Empty without one."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason: str = info.reason
            return reason
    return ""
