"""The errors of the steps, as Temporal and the pipeline see them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from temporalio.exceptions import ApplicationError

from encryption import KeysUnavailable, Unreadable
from jobs.training import OBJECT_MISSING, OUT_OF_MEMORY, OUT_OF_SPACE, STORE_UNAVAILABLE, TRAINING_FAILED
from store.store import ObjectMissing, StoreUnavailable

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def step_errors() -> Iterator[None]:
    """Raise what has ended a step as an ApplicationError, with a reason and whether another attempt may succeed."""
    try:
        yield
    except (StoreUnavailable, KeysUnavailable) as error:
        raise ApplicationError(f"the store is away: {error}", type=STORE_UNAVAILABLE) from error
    except (ObjectMissing, Unreadable) as error:
        message = f"an object of the store is gone: {error}"
        raise ApplicationError(message, type=OBJECT_MISSING, non_retryable=True) from error
    except MemoryError as error:
        raise _out_of_memory() from error
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _out_of_space() from error
    except RuntimeError as error:
        # torch's own class is known to the modules that import torch alone.
        if type(error).__name__ != "OutOfMemoryError" and "not enough memory" not in str(error):
            raise ApplicationError(f"torch: {error}", type=TRAINING_FAILED, non_retryable=True) from error
        raise _out_of_memory() from error
    except Exception as error:  # safetensors' own class, which the modules that import torch alone know
        # It has no errno.
        if not any(os.strerror(code) in str(error) for code in _FULL):
            raise
        raise _out_of_space() from error


def _out_of_space() -> ApplicationError:
    return ApplicationError("the disk of the trainer is full: see TRAINER_WORK_DIR", type=OUT_OF_SPACE)


def _out_of_memory() -> ApplicationError:
    return ApplicationError(
        "the trainer has not enough memory for the model and step_tokens", type=OUT_OF_MEMORY, non_retryable=True
    )
