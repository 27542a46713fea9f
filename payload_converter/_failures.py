"""Failures whose words travel in a payload, which a codec can encrypt. Free of the codec, for workflow sandboxes."""

from temporalio.api.failure.v1 import Failure
from temporalio.converter import DefaultFailureConverterWithEncodedAttributes, PayloadConverter

_ENCODED = "Encoded failure"
"""What the SDK writes in place of a message."""


class EncodedFailureConverter(DefaultFailureConverterWithEncodedAttributes):
    """The SDK's converter, which encodes message and stack trace; here also those of causes that came in clear.

    A failure that arrived from Temporal is passed on as it was, its causes with it. Those that were recorded before
    encryption was switched on, or made by Temporal itself, have their words in clear.
    """

    def to_failure(self, exception: BaseException, payload_converter: PayloadConverter, failure: Failure) -> None:
        """See FailureConverter."""
        super().to_failure(exception, payload_converter, failure)
        while failure.HasField("cause"):
            failure = failure.cause
            if not failure.HasField("encoded_attributes"):
                words = {"message": failure.message, "stack_trace": failure.stack_trace}
                failure.encoded_attributes.CopyFrom(payload_converter.to_payloads([words])[0])
                failure.message, failure.stack_trace = _ENCODED, ""
