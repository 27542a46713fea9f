"""Which JSON has the form of a schema, as far as code depends on it."""

import json
from typing import Any

import pytest

from jobs.schema_fit import misfit

CRITIQUE: Any = {
    "type": "object",
    "properties": {
        "score": {"type": "number"},
        "rank": {"type": ["integer", "null"]},
        "remarks": {"type": "array", "items": {"type": "object", "properties": {"text": {"type": "string"}}}},
    },
    "required": ["score"],
}


@pytest.mark.parametrize(
    "text",
    [
        '{"score": 1}',
        '{"score": 1.5, "more": {}, "rank": null}',
        '{"score": -0, "rank": 2.0, "remarks": [{"text": ""}, {}]}',
    ],
)
def test_what_has_the_form_fits(text: str) -> None:
    assert misfit(json.loads(text), CRITIQUE) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "it must be of the type object"),
        ("{}", "score is missing"),
        ('{"score": "9"}', "score must be of the type number"),
        ('{"score": true}', "score must be of the type number"),
        ('{"score": NaN}', "score is no finite number"),
        ('{"score": 1e999}', "score is no finite number"),
        ('{"score": 1, "rank": 1.5}', "rank must be of the type integer or null"),
        ('{"score": 1, "remarks": [{}, {"text": 5}]}', "remarks[1].text must be of the type string"),
    ],
)
def test_what_has_another_form_is_named(text: str, words: str) -> None:
    assert misfit(json.loads(text), CRITIQUE) == words


@pytest.mark.parametrize(
    "schema",
    [True, {}, {"type": "unheard-of"}, {"type": 5, "required": "score", "properties": []}, {"anyOf": [{}]}],
)
def test_a_schema_that_is_not_understood_refuses_nothing(schema: Any) -> None:
    assert misfit({"score": 1}, schema) is None
