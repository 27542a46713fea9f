"""The base of all errors of this package."""


class DurableLLMError(Exception):
    """The base of all errors of this package."""

    reason = ""
    """The reason that the service gives, google.rpc.ErrorInfo.reason. Empty when it gives none."""
