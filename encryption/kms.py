"""Key-encryption keys at AWS KMS, or at a service that speaks its API. Only this module needs botocore, which signs.

KMS rotates its keys itself. Credentials are those that every AWS program finds: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, a profile, the role of the machine.
"""

import asyncio
import base64
import json
from typing import Any, Final

import aiohttp
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.exceptions import BotoCoreError
from botocore.session import Session

from encryption.cipher import KEY_BYTES
from encryption.errors import KeysUnavailable

_KIND: Final = "kms"
_TIMEOUT: Final = aiohttp.ClientTimeout(total=5)


class Kms:
    """A KeyWrapper by a key of KMS."""

    is_paid = True

    def __init__(self, key: str, url: str | None = None) -> None:
        """`key` is the key's ARN, which names its region; `url` is the service's, by default the region's own."""
        self._key = key
        self._region = key.split(":")[3]
        self._url = url or f"https://kms.{self._region}.amazonaws.com/"
        self._session = Session()

    async def wrap(self, secret: bytes, context: str) -> str:
        """See KeyWrapper."""
        text = base64.b64encode(secret).decode()
        answer = await self._call("Encrypt", context, {"Plaintext": text}, "CiphertextBlob")
        return f"{_KIND}:{answer}"

    async def unwrap(self, wrapped: str, context: str) -> bytes:
        """See KeyWrapper."""
        kind, _, blob = wrapped.partition(":")
        if kind != _KIND:
            raise KeysUnavailable(f"the data key {context} is wrapped by {kind!r}, not by KMS")
        answer = await self._call("Decrypt", context, {"CiphertextBlob": blob}, "Plaintext")
        try:
            secret = base64.b64decode(answer)
        except ValueError:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise KeysUnavailable(f"KMS returns no key of {KEY_BYTES} bytes for {context}")
        return secret

    async def _call(self, operation: str, context: str, arguments: dict[str, str], result: str) -> str:
        # With Decrypt, KeyId refuses a data key that somebody else has wrapped by a key of their own.
        body = json.dumps({**arguments, "KeyId": self._key, "EncryptionContext": {"data-key": context}})
        try:
            headers = await asyncio.to_thread(self._signed, operation, body)
            async with (
                aiohttp.ClientSession(timeout=_TIMEOUT) as http,
                # A redirect could lead a key in clear out of TLS.
                http.post(self._url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                answer: Any = await response.json(content_type=None)
        except (aiohttp.ClientError, BotoCoreError, OSError, TimeoutError, ValueError) as error:
            raise KeysUnavailable(f"KMS does not answer {operation}: {error!r}") from error
        if response.status != 200 or not isinstance(answer, dict) or not isinstance(answer.get(result), str):
            # Its message may quote the request.
            kind = answer.get("__type", "") if isinstance(answer, dict) else ""
            raise KeysUnavailable(f"KMS refuses {operation} with {response.status} {kind}")
        return str(answer[result])

    def _signed(self, operation: str, body: str) -> dict[str, str]:
        headers = {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": f"TrentService.{operation}"}
        credentials = self._session.get_credentials()
        if credentials is None:
            raise KeysUnavailable("there are no AWS credentials to call KMS with")
        request = AWSRequest("POST", self._url, data=body, headers=headers)
        SigV4Auth(credentials.get_frozen_credentials(), "kms", self._region).add_auth(request)
        return dict(request.headers.items())
