"""The errors of the steps, as Temporal and the pipeline see them."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from temporalio.exceptions import ApplicationError

from encryption import KeysUnavailable, Unreadable
from jobs.training import GPU_LOST, OBJECT_MISSING, OUT_OF_MEMORY, OUT_OF_SPACE, STORE_UNAVAILABLE, TRAINING_FAILED
from services.trainer.device import Device
from store.store import ObjectMissing, StoreUnavailable

_ELSEWHERE: Final = timedelta(seconds=1)
"""Time after which a step whose GPU is lost is tried again. Its trainer takes none any more by then."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


_NO_MEMORY: Final = ("out of memory", "not enough memory", "can't allocate memory", "_ALLOC_FAILED")
_LOST_GPU: Final = (
    *("CUDA error", "CUDA driver", "No CUDA GPUs are available", "CUDA unknown error"),
    *("CUBLAS_STATUS", "CUDNN_STATUS", "CUSOLVER_STATUS", "NVML", "NCCL"),
)
_OWN_FAULT: Final = ("device-side assert", "no kernel image is available", "invalid configuration argument")
"""Errors of CUDA that another GPU would have as well."""


@contextmanager
def step_errors(device: Device | None = None) -> Iterator[None]:
    """Raise what has ended a step as an ApplicationError, with a reason and whether another attempt may succeed.

    A GPU that is lost is noted at the device: no later step in this process could use it.
    """
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
        if type(error).__name__ == "OutOfMemoryError" or _says(error, _NO_MEMORY):
            raise _out_of_memory() from error
        if _says(error, _OWN_FAULT) or not _says(error, _LOST_GPU):
            raise ApplicationError(f"torch: {error}", type=TRAINING_FAILED, non_retryable=True) from error
        if device is not None:
            device.lost.set()
        first = str(error).partition("\n")[0]
        message = f"the trainer has lost its GPU, and another one goes on: {first}"
        raise ApplicationError(message, type=GPU_LOST, next_retry_delay=_ELSEWHERE) from error
    except Exception as error:  # safetensors' own class, which the modules that import torch alone know
        # It has no errno.
        if not any(os.strerror(code) in str(error) for code in _FULL):
            raise
        raise _out_of_space() from error


def _says(error: RuntimeError, words: tuple[str, ...]) -> bool:
    return any(word in str(error) for word in words)


def _out_of_space() -> ApplicationError:
    return ApplicationError("the disk of the trainer is full: see TRAINER_WORK_DIR", type=OUT_OF_SPACE)


def _out_of_memory() -> ApplicationError:
    return ApplicationError(
        "the trainer has not enough memory for the model and step_tokens", type=OUT_OF_MEMORY, non_retryable=True
    )
