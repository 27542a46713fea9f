"""Structured output of the torch engine: which tokens may follow, so that the output keeps the form of the job.

xgrammar parses the output as it grows. Its state depends on the output's tokens alone, so another attempt that is given
the same tokens allows the same ones next, and a structured generation continues exactly.
"""

import json
import re
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import torch
import xgrammar

from jobs.errors import UnsupportedParams
from llm_pb import llm_pb2
from services.gpu_worker.engines.engine import CannotContinue

CACHE_BYTES: Final = 64 << 20
"""Memory that compiled forms may hold together, for jobs that ask for the same form again."""
MAX_SECONDS: Final = 0.1
"""Processor time that a form may take of a step, on average over some tokens. The whole batch waits for it."""
_AVERAGED_TOKENS: Final = 16
_PLACE: Final = re.compile(r"^\[[^]]*\] \S+:\d+: ")
_IGNORED: Final = frozenset(
    [
        "multipleOf",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
        "propertyNames",
        "not",
        "if",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedItems",
        "unevaluatedProperties",
    ]
)
"""Keywords of JSON Schema that xgrammar ignores, so that the output might not be valid."""
_OF_A_TYPE: Final = frozenset(
    [
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "minItems",
        "maxItems",
        "minProperties",
        "maxProperties",
    ]
)
"""Keywords that xgrammar ignores in a schema without `type`."""
_LITERAL_KEYWORDS: Final = frozenset(("const", "enum", "default", "examples"))
_NAMING_KEYWORDS: Final = frozenset(("properties", "patternProperties", "$defs", "definitions"))


class StructuredForms:
    """Compiles the forms of jobs for one model. Safe for use by several threads."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: Collection[int]) -> None:
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=self._end_ids)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_limit_bytes=CACHE_BYTES)

    def form_of(self, params: llm_pb2.SamplingParams, output: Sequence[int]) -> "StructuredForm | None":
        """Return the form that a job asks for, after the output generated so far; None for free text.

        Takes up to some seconds. Raises UnsupportedParams, or CannotContinue if the output does not have the form.
        """
        kind = params.WhichOneof("structured_output")
        if kind is None:
            return None
        form = StructuredForm(kind, self._matcher(kind, params), self._vocab_size)
        for token in output:
            form.accept(token)
        return form

    def _matcher(self, kind: str, params: llm_pb2.SamplingParams) -> xgrammar.GrammarMatcher:
        if kind == "json_schema":
            for keyword in ignored_keywords(json.loads(params.json_schema)):
                raise UnsupportedParams(f"params.json_schema: the torch engine does not support {keyword}")
        try:
            if kind == "json_schema":
                # In one line: a small model may not find its way out of white space.
                compiled = self._compiler.compile_json_schema(params.json_schema, any_whitespace=False)
            elif kind == "regex":
                compiled = self._compiler.compile_regex(params.regex)
            else:
                compiled = self._compiler.compile_grammar(grammar_of(params.choice.options))
        except RuntimeError as error:
            # In one line, and without the place in the source of xgrammar.
            said = str(error).strip().splitlines()[0] if str(error).strip() else "it cannot be compiled"
            raise UnsupportedParams(f"params.{kind}: {_PLACE.sub('', said)}") from error
        return xgrammar.GrammarMatcher(compiled, override_stop_tokens=self._end_ids)


class StructuredForm:
    """The form of one generation's output, and how far the output has come in it."""

    def __init__(self, kind: str, matcher: xgrammar.GrammarMatcher, vocab_size: int) -> None:
        self._kind = kind
        self._matcher = matcher
        self._allowed = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._tokens = 0
        self._seconds = 0.0

    def masked(self, scores: torch.Tensor) -> torch.Tensor:
        """Return a row of scores in which the tokens that the form does not allow next are minus infinity.

        Raises UnsupportedParams if the form takes so long that it slows the whole batch, or allows no token.
        """
        since = time.thread_time()
        self._matcher.fill_next_token_bitmask(self._allowed)
        self._note(time.thread_time() - since)
        if not self._allowed.any():
            raise UnsupportedParams(f"params.{self._kind} allows no output, or none that goes on from here")
        scores = scores.clone()
        xgrammar.apply_token_bitmask_inplace(scores[None], self._allowed)
        return scores

    def accept(self, token: int) -> None:
        """Add a token to the output. Raises CannotContinue for one that the form does not allow."""
        if not self._matcher.accept_token(token):
            raise CannotContinue("the tokens generated so far do not have the form that the job asks for")

    def _note(self, seconds: float) -> None:
        self._tokens += 1
        self._seconds += seconds
        if self._tokens < _AVERAGED_TOKENS:
            return
        if self._seconds / self._tokens > MAX_SECONDS:
            remedy = "simplify it, with fewer repeats that match the same text"
            raise UnsupportedParams(f"params.{self._kind} slowed every job of its batch: {remedy}")
        self._tokens, self._seconds = 0, 0.0


def ignored_keywords(schema: object) -> Iterator[str]:
    """Yield what a JSON Schema asks for and xgrammar ignores."""
    if isinstance(schema, list):
        for item in schema:
            yield from ignored_keywords(item)
    if not isinstance(schema, dict):
        return
    yield from schema.keys() & _IGNORED
    if "type" not in schema:
        yield from (f"{keyword} without type" for keyword in schema.keys() & _OF_A_TYPE)
    if schema.keys() & {"pattern", "format"} and schema.keys() & {"minLength", "maxLength"}:
        yield "a length together with pattern or format"
    if isinstance(schema.get("allOf"), list) and len(schema["allOf"]) > 1:
        yield "allOf with several schemas"
    if not str(schema.get("$ref", "#")).startswith("#"):
        yield "a $ref to another document"
    for keyword, value in schema.items():
        if keyword in _NAMING_KEYWORDS and isinstance(value, dict):
            for named in value.values():
                yield from ignored_keywords(named)
        elif keyword not in _LITERAL_KEYWORDS:
            yield from ignored_keywords(value)


def grammar_of(choices: Sequence[str]) -> str:
    """Return the grammar, in xgrammar's EBNF, of one of these texts."""
    return "root ::= " + " | ".join(f'"{_escaped(choice)}"' for choice in choices)


def _escaped(text: str) -> str:
    return "".join(
        f"\\u{ord(char):04x}" if ord(char) < 0x20 or char in '"\\\x7f' else char  # what ends or changes a literal
        for char in text
    )
