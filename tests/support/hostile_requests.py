"""Requests that cost their sender little and a careless server much. Each has a name, a method and its bytes."""

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Final

from jobs.rules import MAX_REGEX_BYTES, MAX_SCHEMA_BYTES
from llm_pb import llm_pb2
from services.gateway.parsing import MAX_FIELDS
from tests.support.bad_requests import submit

MIB: Final = 1 << 20


def length_delimited(number: int, value: bytes) -> bytes:
    """Return a field of wire type 2."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def in_job(data: bytes) -> bytes:
    """Return a serialized SubmitRequest of a valid job with these further bytes of a JobRequest."""
    return submit() + length_delimited(1, data)


def in_params(data: bytes) -> bytes:
    return in_job(length_delimited(6, data))


def deep_json(size: int) -> str:
    return '{"a":' * (size // 5)


SCRIPTS: Final = [
    *(chr(code) for code in range(33, 127) if chr(code).isalnum()),
    *(chr((block << 10) + 5) for block in range(1, 0x110000 >> 10) if not 0x36 <= block < 0x38),
]
"""Characters that the check of an expression distinguishes."""
PAIRS: Final = [f"[^{one}{other}]" for one, other in itertools.combinations(SCRIPTS[:40], 2)]
VARYING: Final = "".join(f"{char}?" for char in SCRIPTS[40:104])
"""The maximum number of different adjacent parts of varying length."""


def schema_of(pattern: str) -> str:
    """Return a schema of the maximum length that has the pattern and many empty objects."""
    empty = (MAX_SCHEMA_BYTES - len(json.dumps({"pattern": pattern, "a": []}))) // len("{},")
    return json.dumps({"pattern": pattern, "a": [{}] * empty}, separators=(",", ":"))


def schema_of_many(piece: str) -> str:
    """Return a schema of the maximum length that holds the piece again and again."""
    pieces = [piece] * ((MAX_SCHEMA_BYTES - len('{"a":[]}')) // (len(piece) + 1))
    return f'{{"a":[{",".join(pieces)}]}}'


def longest(pieces: Iterable[str], size: int = MAX_REGEX_BYTES) -> str:
    """Join as many of the pieces as fit into `size` bytes."""
    text = bytearray()
    for piece in pieces:
        if len(text) + len(piece.encode()) > size:
            break
        text += piece.encode()
    return text.decode()


def nested(levels: int) -> str:
    """Return an expression of nested groups. The check compares the parts after a group with all parts inside it."""
    inner = longest(PAIRS, MAX_REGEX_BYTES - levels * (len(VARYING.encode()) + 3))
    for _ in range(levels):
        inner = f"({inner})!{VARYING}"
    return inner


EXPRESSIONS: Final[Mapping[str, str]] = {
    "different parts side by side": longest(f"{char}?" for char in SCRIPTS),
    "different parts among others": longest(f"{char}?." for char in SCRIPTS),
    "different parts, each before what is none": longest(f"{char}?[^{char}]" for char in SCRIPTS),
    "different parts, each before its own": longest(f"[^{char}]?{char}" for char in SCRIPTS),
    "different parts of two characters": longest(
        f"[{a}{b}]?" for a, b in zip(SCRIPTS[::2], SCRIPTS[1::2], strict=False)
    ),
    "many different parts before what separates none": longest(["".join(f"{c}?" for c in SCRIPTS[40:440]), *PAIRS]),
    "different parts before what separates none": longest([VARYING, *PAIRS]),
    "different parts within what separates none": longest([*PAIRS[:360], VARYING, *PAIRS[360:]]),
    "groups in groups, of different parts": nested(15),
    "some groups in groups, of different parts": nested(4),
    "different alternatives": longest(f"{char}?-|" for char in SCRIPTS),
    "different alternatives with different ends": longest(f"{a}?{b}|" for a, b in itertools.pairwise(SCRIPTS)),
    "different alternatives of two characters": longest(f"[{a}{b}]?-|" for a, b in itertools.combinations(SCRIPTS, 2)),
    "different alternatives among others": longest(
        [*(f"{char}?-|" for char in SCRIPTS[40:104]), *(f"{char}|" for char in SCRIPTS)]
    ),
    "different alternatives among negated ones": longest(
        [*(f"{char}?-|" for char in SCRIPTS[40:104]), *(f"{pair}|" for pair in PAIRS)]
    ),
    "any characters": "." * MAX_REGEX_BYTES,
    "separated repeats": longest(itertools.repeat("a*b")),
    "a group in each alternative": longest(itertools.repeat("(a?b|c)")),
    "one repeat again and again": longest(itertools.repeat("a{1}{1}")),
    "braces that end far away": longest(itertools.repeat("a{"), MAX_REGEX_BYTES - 1) + "}",
    "braces that do not end": longest(itertools.repeat(r"\p{")),
    "open groups": longest(itertools.repeat("(a|")),
    "sets in a set": longest(["[", *itertools.repeat(r"\w\W", 1000)]),
    "ranges": longest(["[", *(f"\x00-{char}" for char in reversed(SCRIPTS))]),
}
"""Expressions of 4 KiB that are costly to check."""

LARGE = 2_031_000
"""Size in bytes of the large jobs, just below the maximum."""
NOT_UTF8 = length_delimited(1, b"\xff")

BODIES: Final[Mapping[str, tuple[str, bytes]]] = {
    # Empty messages cost most together with one text that is not UTF-8.
    "empty messages and a text that is not UTF-8": ("Submit", in_job(b"\x2a\x00" * (2 * MIB - 64) + NOT_UTF8)),
    "empty messages": ("Submit", in_job(b"\x2a\x00" * (LARGE // 2))),
    "empty jobs": ("Submit", b"\x0a\x00" * (LARGE // 2)),
    "empty stop texts": ("Submit", in_params(b"\x42\x00" * (LARGE // 2))),
    "empty choices": ("Submit", in_params(length_delimited(14, b"\x0a\x00" * (LARGE // 2)))),
    "empty targets": ("Submit", in_job(b"\x4a\x00" * (LARGE // 2))),
    "texts that are not UTF-8": ("Submit", in_job(b"\x2a\x03\x12\x01\xff" * (LARGE // 5))),
    "a prompt that is not UTF-8": ("Submit", in_job(length_delimited(4, b"\xff" * LARGE))),
    "stop texts that are not UTF-8": ("Submit", in_params(length_delimited(8, b"\xff" * 250) * (LARGE // 260))),
    "packed events": ("Submit", in_job(length_delimited(11, length_delimited(1, b"\x03" * LARGE)))),
    "events": ("Submit", in_job(length_delimited(11, b"\x08\x03" * (LARGE // 2)))),
    "one field again and again": ("Submit", in_job(b"\x40\x03" * (LARGE // 2))),
    "one duration again and again": ("Submit", in_job(length_delimited(10, b"\x0a\x00" * (LARGE // 2)))),
    "unknown numbers": ("Submit", in_job(b"\xf8\x07\x01" * (LARGE // 3))),
    "unknown texts": ("Submit", b"\xfa\x07\x00" * (LARGE // 3)),
    "unknown groups": ("Submit", b"\xfb\x07\xfc\x07" * (LARGE // 4)),
    "groups in groups": ("Submit", b"\xfb\x07" * (LARGE // 2)),
    "a number without an end": ("Submit", in_job(b"\x40" + b"\x80" * LARGE)),
    "a long URL": ("Submit", submit(notify=[{"webhook": {"url": "http://é" + "é/@:[" * (LARGE // 7)}}])),
    "a long model": ("Submit", submit(model="a" * LARGE)),
    "a long schema, deeply nested": ("Submit", submit(model="structured", params={"json_schema": deep_json(65_000)})),
    "a schema of many numbers": (
        "Submit",
        # It is accepted, so its key is of no other test.
        submit(user_id="numbers", model="structured", params={"json_schema": json.dumps({"a": [0] * 21_000})}),
    ),
    # The empty user_id is refused, so that no engine runs the expressions that are allowed.
    **{
        f"an expression: {what}": ("Submit", submit(user_id="", model="structured", params={"regex": pattern}))
        for what, pattern in EXPRESSIONS.items()
    },
    "a schema of many objects and an expression": (
        "Submit",
        submit(
            user_id="",
            model="structured",
            params={"json_schema": schema_of(EXPRESSIONS["different parts before what separates none"])},
        ),
    ),
    **{
        f"a schema of many {what}": (
            "Submit",
            submit(user_id="", model="structured", params={"json_schema": schema_of_many(piece)}),
        )
        for what, piece in {"patterns": '{"pattern":""}', "lengths": '{"maxLength":1}', "arrays": "[[[[0]]]]"}.items()
    },
    "as many bad texts as are counted": ("Submit", in_job(b"\x2a\x03\x12\x01\xff" * (MAX_FIELDS // 2 - 8))),
    "as many stop texts as are counted": ("Submit", in_params(length_delimited(8, b"\xff" * 240) * (MAX_FIELDS - 10))),
    "4 MiB of a prompt": ("Submit", submit(prompt="x" * (4 * MIB - 1000))),
    "states": ("List", length_delimited(2, b"\x01" * (4 * MIB - 1000))),
    "unknown fields": ("GetStatus", b"\xf8\x07\x01" * MIB),
    "an id": ("StreamStatus", llm_pb2.StreamStatusRequest(workflow_id="a" * (4 * MIB - 100)).SerializeToString()),
    "a reason": ("Cancel", llm_pb2.CancelRequest(workflow_id="a", reason="é" * MIB).SerializeToString()),
    "delivery ids": ("Redeliver", length_delimited(2, b"") * MIB),
    "what GetQuota does not have": ("GetQuota", b"\x08\x01" * MIB),
    "what ListModels does not have": ("ListModels", b"\x08\x01" * MIB),
}
