"""Structured output that would slow down the whole batch is refused before it reaches an engine; other is not."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import InvalidJob
from jobs.regex_cost import check_regex
from jobs.regex_parts import TooCostly
from jobs.rules import MAX_CHOICES_BYTES, MAX_SCHEMA_BYTES, check_job, check_submit, require_valid
from llm_pb import llm_pb2
from tests.support.bad_requests import job
from tests.support.hostile_requests import SCRIPTS

CHEAP = {
    "date": r"\d{4}-\d{2}-\d{2}",
    "timestamp": r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?(Z|[+-]\d{2}:\d{2})",
    "email": r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}",
    "email of HTML": r"[a-zA-Z0-9.!#$%&'*+/=?^_`{|}~-]+@[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?)*",
    "phone": r"\+?1?[-. ]?\(?\d{3}\)?[-. ]?\d{3}[-. ]?\d{4}",
    "phone by blocks": r"(\d{2,4}[- ]?){2,5}",
    "phones by blocks": r"((\d{2,4}[- ]?){2,5}, )*",
    "lists of one or two words": r"((\w+ ?){1,2},)*",
    "host": r"([a-z0-9]+(-[a-z0-9]+)*\.)+[a-z]{2,}",
    "url": r"https?://[^\s/$.?#].[^\s]*",
    "IPv4": r"(\d{1,3}\.){3}\d{1,3}",
    "IPv4 in range": r"((25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(25[0-5]|2[0-4]\d|1?\d?\d)",
    "IPv6": r"([0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}",
    "UUID": r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}",
    "version": r"v?\d+\.\d+\.\d+(-[\w.]+)?(\+[\w.]+)?",
    "number": r"-?\d+(\.\d+)?([eE][+-]?\d+)?",
    "money": r"\$?\d{1,3}(,\d{3})*(\.\d{2})?",
    "words": r"(\w+ )*\w+",
    "words of any space": r"([a-z]+\s+)*",
    "Russian words": r"([а-яё]+ — )*[а-яё]+",
    "Chinese words": r"[\u4e00-\u9fff]+(、[\u4e00-\u9fff]+)*",
    "a bounded word": r"[a-z]{1,64}",
    "a bounded text": r".{0,1000}",
    "any text": r"[\s\S]*",
    "quoted list": r'("[^"]*"(, )?)*',
    "list of numbers": r"\[(\d+(, \d+)*)?\]",
    "object": r'\{("\w+": ("[^"]*"|\d+)(, )?)*\}',
    "JSON string": r'"([^"\\]|\\.)*"',
    "lines": r"(.*\n)*",
    "bullets": r"(- .+\n)+",
    "numbered": r"(\d+\. .*\n){1,10}",
    "CSV": r"([^,\n]*(,[^,\n]*)*\n)*",
    "table": r"(\|[^|\n]*)+\|\n",
    "settings": r"(\s*[a-z]+\s*=\s*[^;]+;)*",
    "names": r"([A-Z][a-z]+ ){0,3}[A-Z][a-z]+",
    "formula": r"([A-Z][a-z]?\d*)+",
    "base64": r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?",
    "found in text": r".*foo.*bar.*",
    "many short ones": r"a+b" * 1365,
    "choices": r"(yes|no|maybe)",
    "a year of two or four digits": r"\d{1,2}/\d{1,2}/(\d{2}|\d{4})",
    "colours": r"(#([0-9a-f]{3}|[0-9a-f]{6}), )*",
    "a time": r"([01]\d|2[0-3]):[0-5]\d",
    "codes of one length": r"([A-Z]{3}|\d{3})*",
    "repeated choices": r"(cat|dog|, )*",
    "many alternatives": "|".join(f"country {number}s?|{number} islands?" for number in range(100)),
    "alternatives with as many ends as are compared": "|".join(f"{char}-{char}?" for char in SCRIPTS[:64]),
    "as many different parts as are compared": "".join(f"{char}?" for char in SCRIPTS[:64]),
    "many optional parts that something separates": "".join(f"(-{char}+)?;" for char in SCRIPTS[:64] * 5),
    "a deep nest with separators": r"((\w+,)*\w+;)*",
    "anchored": r"^(\w+ )*\w+$",
}
"""Regular expressions of the kind that people write."""

COSTLY = {
    "stars in stars": r"((a*)*)*",
    "stars in a star": r"(a*)*",
    "pluses in a plus": r"(a+)+",
    "lazy": r"(a*?)*?",
    "possessive": r"(a++)++",
    "groups that capture nothing": r"(?:(?:a*)*)*",
    "words without a separator": r"(\w+ ?)*",
    "words with an optional space": r"(\w+\s*)*",
    "a separator that is of the word": r"(\w+\w)*",
    "a path": r"([\/\w \.-]*)*",
    "alternatives": r"(\w+|\d+)*",
    "alternatives of two lengths": r"(.{3}|.{20})*",
    "alternatives of many lengths": r"(.{5}|.{7}|.{11}|.{13}|.{17}|.{19}|.{23})*",
    "classes of two lengths": r"(\w{2}|\d{3})*",
    "an alternative inside the other": r"(a|\w+)*",
    "an alternative that makes the other's rest": r"(\w+ |\w)*",
    "a bounded word": r"(\w{1,8} ?)*",
    "bounded in bounded": r"(\w{1,8} ?){1,8}",
    "bounded in bounded, short": r"(\w{1,4} ?){1,4}",
    "bounded in bounded, in a star with a separator": r"((\w{1,4} ?){1,4},)*",
    "bounded in bounded, of any characters": r"((.{1,2}){1,4}\n)*",
    "bounded in bounded, side by side": r"((\w{1,2} ?){1,3}(\w{1,2} ?){1,3},)*",
    "unbounded in bounded, side by side": r"((\w+ ?){1,2}(\w+ ?){1,2},)*",
    "the same in optional groups": r"(((\w+ ?){1,2}-?)?((\w+ ?){1,2}-?)?,)*",
    "digits in bounded": r"(\d{1,8} ?){1,8}",
    "long bounded in bounded": r"(\w{1,500} ?){1,500}",
    "unbounded in bounded": r"(\w+,?){0,50}",
    "optional in a star": r"(\w?)*",
    "optional in bounded": r"(\w?){500}",
    "three deep": r"((\w?){50}){50}",
    "side by side": r"a*a*a*a*a*a*a*a*",
    "groups side by side": r"(\w+)?(\w+)?(\w+)?",
    "stars of stars side by side": r"(a*)*(a*)*",
    "alternatives with many different ends": "|".join(f"{char}-{char}?" for char in SCRIPTS[:65]),
    "many different parts": "".join(f"{char}?" for char in SCRIPTS[:65]),
    "many different parts that something separates": "".join(f"{char}+-" for char in SCRIPTS[:65]),
    "many long bounds": r".{0,200}a.{0,201}b.{0,202}c.{0,203}d" * 3,
    "forty groups": "(" * 40 + "a" + ")" * 40,
    # Python's own parser would take these for a class, a comment, a flag or an error.
    "behind an empty class": r"[]((a*)*)*]",
    "behind a comment": r"(?#()((a*)*)*",
    "behind a flag": "(?x)#\n((a*)*)*",
    "behind an escaped parenthesis": r"\)((a*)*)*",
    "behind a parenthesis too many": r"a)((a*)*)*",
    "behind what is not known": r"\p{L}(?<name>(a*)*)*",
}
"""Expressions that cost an engine more than a step of the whole batch. xgrammar itself refuses some of the last."""

STRING: dict[str, Any] = {"type": "string"}


def violations(**params: Any) -> list[tuple[str, str]]:
    request = llm_pb2.SubmitRequest(job=job(params=params))
    return [(violation.field, violation.description) for violation in check_submit(request)]


@pytest.mark.parametrize("pattern", CHEAP.values(), ids=CHEAP.keys())
def test_what_people_write_is_accepted(pattern: str) -> None:
    assert violations(regex=pattern) == []
    assert violations(json_schema=json.dumps({**STRING, "pattern": pattern})) == []


@pytest.mark.parametrize("pattern", COSTLY.values(), ids=COSTLY.keys())
def test_what_slows_the_batch_is_refused(pattern: str) -> None:
    """This holds for a regex and every pattern of a schema. The error names the field and states what it must be."""
    ((field, description),) = violations(regex=pattern)
    assert field == "job.params.regex"
    assert description.startswith("must ")
    for schema in (
        {**STRING, "pattern": pattern},
        {"type": "object", "patternProperties": {pattern: STRING}},
        {"type": "object", "propertyNames": {"pattern": pattern}},
        {"$defs": {"x": [{"anyOf": [{**STRING, "pattern": pattern}]}]}},
        {"type": "object", "properties": {"enum": {**STRING, "pattern": pattern}}},
    ):
        ((field, description),) = violations(json_schema=json.dumps(schema))
        assert field == "job.params.json_schema"
        assert "must " in description


def object_of(lengths: list[int]) -> str:
    fields = {f"field-{number}": {**STRING, "maxLength": length} for number, length in enumerate(lengths)}
    return json.dumps({"type": "object", "properties": fields})


def test_the_lengths_of_a_schema_are_bounded_together() -> None:
    """The engine compiles each distinct length once."""
    assert violations(json_schema=object_of([255] * 100)) == []
    assert violations(json_schema=object_of([20, 50, 64, 100, 255, 500, 1000, 2000, 4000])) == []
    ((field, description),) = violations(json_schema=object_of(list(range(200, 220))))
    assert field == "job.params.json_schema"
    assert "lengths" in description


def nested(depth: int) -> str:
    return '{"type": "array", "items":' * depth + '{"type": "string"}' + "}" * depth


def optional(count: int, required: int = 0) -> str:
    names = [f"p{number}" for number in range(count)]
    return json.dumps({"type": "object", "properties": {key: {} for key in names}, "required": names[:required]})


def test_the_depth_of_a_schema_is_bounded() -> None:
    """900 levels, a third of what fits, were compiled for minutes."""
    assert violations(json_schema=nested(100)) == []
    assert "128 deep" in str(violations(json_schema=nested(300)))
    assert "128 deep" in str(violations(json_schema='{"anyOf":' + "[" * 130 + "]" * 130 + "}"))
    assert violations(json_schema='{"a":' * 127 + "{}" + "}" * 127) == []
    assert "128 deep" in str(violations(json_schema='{"a":' * 128 + "{}" + "}" * 128)), "an empty object is one, too"


def test_the_optional_properties_of_an_object_are_bounded() -> None:
    """1500 were compiled for minutes; those that are required are not."""
    assert violations(json_schema=optional(512)) == []
    assert violations(json_schema=optional(1500, required=1000)) == []
    assert "512 properties" in str(violations(json_schema=optional(1500)))
    assert violations(json_schema='{"properties": {"required": {}}, "required": 5}') == []


def test_the_patterns_of_a_schema_are_bounded_together() -> None:
    many = {"anyOf": [{**STRING, "pattern": f"[a-z]{{{number}}}"} for number in range(1000)]}
    assert violations(json_schema=json.dumps(many))


@pytest.mark.parametrize("length", [-1, "x", None, [], 1e400, float("nan"), 10**30, True])
def test_a_length_that_is_none_is_for_the_engine_to_refuse(length: Any) -> None:
    assert violations(json_schema=json.dumps({**STRING, "maxLength": length, "pattern": length})) == []


def test_the_choices_are_bounded_together() -> None:
    assert violations(choice={"options": ["x" * 4096] * (MAX_CHOICES_BYTES // 4096)}) == []
    ((field, _),) = violations(choice={"options": ["x" * 1800] * 500})
    assert field == "job.params.choice.options"


def test_what_came_past_the_gateway_is_refused_unless_it_began_before() -> None:
    costly = job(params={"regex": "((a*)*)*"})
    with pytest.raises(InvalidJob, match=r"params\.regex must not repeat"):
        require_valid(costly)
    assert not check_job(costly, strict=False), "the lenient check accepts jobs from before the rule"


@given(st.text(alphabet=r"ab\w[]^-(){}|*+?.,:<>=!Pxu0129dé" + "\ud800\x00", max_size=60))
def test_any_text_is_judged(pattern: str) -> None:
    with contextlib.suppress(TooCostly):
        check_regex(pattern)


def test_the_deepest_schemas_are_judged() -> None:
    depth = MAX_SCHEMA_BYTES // 10
    violations(json_schema='{"not":' * depth + "{}" + "}" * depth)
    assert violations(json_schema='{"not":' * 60 + '{"pattern": "((a*)*)*"}' + "}" * 60)
