"""What becomes of the store's errors in a call of the API."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from encryption import Unreadable
from services.gateway.errors import content_unreadable, store_unavailable
from store.store import ObjectMissing, StoreUnavailable

_log = logging.getLogger(__name__)


class ContentDamaged(ValueError):
    """The store's content of a file has another hash than its record."""


@contextmanager
def store_errors(file_id: str) -> Iterator[None]:
    """Raise the errors of the store as ApiError: UNAVAILABLE, or DATA_LOSS for a content that never comes back."""
    try:
        yield
    except StoreUnavailable as error:
        _log.warning("the store is away: %s", error, extra={"file_id": file_id})
        raise store_unavailable() from error
    except ObjectMissing as error:
        _log.error("a part of a file is missing: %s", error, extra={"file_id": file_id})
        raise content_unreadable(f"a part of the content of {file_id} is no more in the store") from error
    except ContentDamaged as error:
        _log.error("a file is damaged", extra={"file_id": file_id})
        raise content_unreadable(f"the content of {file_id} is damaged in the store") from error
    except Unreadable as error:
        _log.warning("a file is unreadable: %s", error, extra={"file_id": file_id})
        raise content_unreadable(f"the content of {file_id} can never be decrypted again") from error
