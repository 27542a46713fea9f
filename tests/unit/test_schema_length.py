"""The longest JSON that a schema allows bounds what its model may generate."""

import json
from typing import Any

import pytest

from jobs.schema_length import longest_json

TEXT = {"type": "string", "maxLength": 5}
TEXTS = {"type": "array", "items": TEXT, "maxItems": 2}


def of(properties: Any, **more: Any) -> Any:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


@pytest.mark.parametrize(
    ("schema", "longest"),
    [
        (TEXT, "12345"),
        (TEXT, '"""""'),
        (TEXTS, ["12345", "12345"]),
        ({**TEXTS, "maxItems": 0}, []),
        ({"type": "number"}, -1.2345678901234567e-308),
        ({"type": "integer"}, -(2**63)),
        ({"type": "boolean"}, False),
        ({"type": "null"}, None),
        ({"const": "a constant"}, "a constant"),
        ({"enum": ["one", {"two": 3}, 4]}, {"two": 3}),
        (of({}), {}),
        (of({"ä": TEXT, "b": TEXTS}, required=["b"]), {"ä": "12345", "b": ["12345", "12345"]}),
    ],
)
def test_no_value_that_a_schema_allows_is_longer(schema: Any, longest: Any) -> None:
    text = json.dumps(longest, ensure_ascii=False).replace('\\"', '"')
    bound = longest_json(schema)
    assert bound is not None
    assert len(text) <= bound <= len(text) + 10


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "string"},
        {"type": "string", "maxLength": "5"},
        {"type": ["string", "null"], "maxLength": 5},
        {"type": "array", "items": TEXT},
        {"type": "array", "maxItems": 2},
        {**TEXTS, "prefixItems": [{"type": "string"}]},
        {"type": "object", "properties": {"a": TEXT}},
        of({"a": {"type": "string"}}),
        of({"a": TEXT}, patternProperties={"b": TEXT}),
        {"$ref": "#/$defs/a", "$defs": {"a": TEXT}},
        {"anyOf": [TEXT]},
        {"type": "unheard of"},
    ],
)
def test_a_schema_that_does_not_bound_its_json_has_no_longest(schema: Any) -> None:
    assert longest_json(schema) is None
