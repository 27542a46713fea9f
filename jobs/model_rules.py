"""The rules for requests about trained models."""

from collections.abc import Iterator

from jobs.field_rules import Violation
from jobs.training import ALIAS_PATTERN, LATEST, MODEL_NAME_PATTERN
from llm_pb import llm_pb2


def check_set_alias(request: llm_pb2.SetModelAliasRequest) -> list[Violation]:
    """Return the violations of a SetModelAliasRequest."""
    found = [*_model(request.model)]
    if ALIAS_PATTERN.fullmatch(request.alias) is None:
        found.append(Violation("alias", "is required: a letter, then up to 63 of A-Z a-z 0-9 . _ -"))
    elif request.alias == LATEST:
        found.append(Violation("alias", f'must not be "{LATEST}", which always names the newest version'))
    if request.version < 0:
        found.append(Violation("version", "must be a version from 1, or 0 to remove the alias"))
    return found


def check_delete_version(request: llm_pb2.DeleteModelVersionRequest) -> list[Violation]:
    """Return the violations of a DeleteModelVersionRequest."""
    found = [*_model(request.model)]
    if request.version < 1:
        found.append(Violation("version", "is required: a version from 1"))
    return found


def _model(name: str) -> Iterator[Violation]:
    if MODEL_NAME_PATTERN.fullmatch(name) is None:
        yield Violation("model", "is required: the name of a trained model, without a version")
