"""The page tokens of List, ListFiles and ListBatches: Temporal's own, authenticated with a key that gateways share.

Temporal answers UNKNOWN to a token that it cannot read, and returns wrong pages for a token of other filters. It trusts
a token, so a forged one reaches its visibility store. A message authentication code over the tenant, the filters and
the token detects all of these before Temporal is asked.
"""

import base64
import binascii
import copy
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final, TypeAlias

from pydantic import SecretStr

from jobs.field_rules import Violation
from llm_pb import batch_pb2, file_pb2, llm_pb2, pipeline_pb2, schedule_pb2
from runtime.grpc_auth import current_caller

PageRequest: TypeAlias = (
    llm_pb2.ListRequest
    | file_pb2.ListFilesRequest
    | schedule_pb2.ListSchedulesRequest
    | batch_pb2.ListBatchesRequest
    | pipeline_pb2.ListPipelinesRequest
)
"""Requests with filters, page_size and page_token."""
_MAC_BYTES: Final = 16
_KEY_BYTES: Final = 32
_RULE: Final = "must be the next_page_token of the page before, with the same filters"
_OF_THIS_PROCESS: Final = ", and made by this process: GATEWAY_PAGE_TOKEN_KEY, which gateways share, is not set"


class PageTokens:
    """Creates and checks page tokens."""

    def __init__(self, key: SecretStr | None) -> None:
        """Without a key, tokens are valid only for this object."""
        self.refused = Violation("page_token", _RULE + _OF_THIS_PROCESS if key is None else _RULE)
        """What is wrong with a page token that unseal() or Temporal refuses."""
        self._key = secrets.token_bytes(_KEY_BYTES) if key is None else key.get_secret_value().encode()

    def seal(self, tenant: str, request: PageRequest, token: bytes | None) -> str:
        """Return the token of the page after that of the request; empty when there is none."""
        return base64.urlsafe_b64encode(self._mac(tenant, request, token) + token).decode() if token else ""

    def unseal(self, tenant: str, request: PageRequest) -> bytes | None:
        """Return Temporal's token, None for the first page.

        Raises ValueError for a token that seal() did not make for the tenant and the request.
        """
        if not request.page_token:
            return None
        try:
            data = base64.b64decode(request.page_token, altchars=b"-_", validate=True)
        except binascii.Error as error:
            raise ValueError("the page token is not base64url") from error
        mac, token = data[:_MAC_BYTES], data[_MAC_BYTES:]
        if not token or not hmac.compare_digest(mac, self._mac(tenant, request, token)):
            raise ValueError("the page token was not created by this service, or belongs to other filters")
        return token

    async def check(self, request: PageRequest) -> Sequence[Violation]:
        """Return the violations of the page token of the call that is being handled."""
        try:
            self.unseal(current_caller().tenant, request)
        except ValueError:
            return [self.refused]
        return []

    def _mac(self, tenant: str, request: PageRequest, token: bytes) -> bytes:
        filters = copy.deepcopy(request)
        filters.ClearField("page_size")
        if isinstance(filters, llm_pb2.ListRequest):
            # The same states or classes in another order are the same filter.
            filters.states[:] = sorted(set(filters.states))
            filters.classes[:] = sorted(set(filters.classes))
        filters.ClearField("page_token")
        # No token of one kind of list is valid for another. A message begins with a tag, which "l" is not.
        kind = "" if isinstance(filters, llm_pb2.ListRequest) else filters.DESCRIPTOR.full_name
        # The hash has a fixed length, so the boundary between filters and token is unambiguous.
        about = hashlib.sha256(kind.encode() + filters.SerializeToString(deterministic=True)).digest()
        # Each tenant has a key of its own, so that no text of one can stand for another's.
        key = hmac.digest(self._key, tenant.encode(), hashlib.sha256) if tenant else self._key
        return hmac.digest(key, about + token, hashlib.sha256)[:_MAC_BYTES]
