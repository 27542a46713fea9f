r"""The cost of a regular expression for the engine at every token, estimated from its form before it is compiled.

A structured job is constrained in the step that all jobs of a batch share: xgrammar, vLLM's backend, computes which
tokens may follow. It keeps every parse of the text so far, so ambiguity is what costs: a repeat within a repeat without
a required separator between two rounds. Measured with xgrammar 0.2.8, a vocabulary of 131,000 tokens, one core of a
busy machine, in milliseconds a token (mean of the first 100 to 200 tokens, and the worst):

| expression                           | mean | worst | here     |
|--------------------------------------|------|-------|----------|
| `(\w+ )*\w+`                         |  0.9 |   1.1 | accepted |
| `("[^"]*"(, )?)*`                    | 0.01 |   0.2 | accepted |
| `((\w+,)*\w+;)*`                     | 0.01 |   0.2 | accepted |
| `([a-z]+\s+)*`                       |   12 |    46 | accepted |
| `.{0,500}`                           |   15 |    65 | accepted |
| `((\w{1,4} ?){1,4},)*` (product 16)  |  160 |   325 | refused  |
| `((\w+ ?){1,2}(\w+ ?){1,2},)*`       |  295 |   418 | refused  |
| `((\w+ ?){1,2},)*` (product 6)       |   27 |    38 | accepted |
| `(\w+ ?)*`                           |   36 |   153 | refused  |
| `(\w+)?(\w+)?(\w+)?`                 |   66 |   199 | refused  |
| `((a*)*)*`                           |   96 |  1393 | refused  |
| `(\w+|\d+)*`                          |  104 |   319 | refused  |
| `(\w+ |\w| )*`                       |  140 |   617 | refused  |
| `(\w{1,8} ?){1,8}` (product 64)       |  780 |  2513 | refused  |
| `(\w?){500}` (product 1000)           | 2398 |  3728 | refused  |
| `(\w{1,500} ?){1,500}`               | 3145 |  7981 | refused  |

The estimate takes time that grows with the expression's length, which its caller bounds. It errs in both directions:
`("([^"]|"")*",)*`, CSV with doubled quotes, costs 0.02 ms a token and is refused, because the estimate does not see
that a quote inside never stands alone. That is why the engine has a guard as well
(services.gpu_worker.engines.structured_guard). An expression that cannot be parsed here
is left to the engine, which refuses
what it cannot compile. An expression is parsed as by xgrammar, close to JavaScript, and not as by Python's `re`. The
two differ in where a class ends and in flags: a comment or plain characters in one can be a repeat in the other.
"""

from typing import Final

from jobs.regex_parts import ALL, DIGITS, Part, TooCostly, bits_of, char_of, joined, literal, one_of, range_of, repeated

MAX_DEPTH: Final = 32
"""Maximum depth of nested groups."""
MAX_BOUNDS: Final = 1024
"""Maximum sum of the bounds of all repeats and lengths of one job. Compiling takes up to 15 ms for each unit of it."""
MAX_BOUND: Final = 128
"""Maximum that one repeat adds to that sum. A longer repeat compiles in about the same time."""

_CLASSES: Final = {
    "d": DIGITS,
    "w": DIGITS | range_of(ord("a"), ord("z")) | range_of(ord("A"), ord("Z")) | bits_of("_"),
    "s": bits_of(" \t\n\r\f\v\u00a0"),
}
_ANY: Final = char_of(ALL & ~bits_of("\n"))
_CONTROLS: Final = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}


def check_regex(pattern: str) -> None:
    """Raise TooCostly for an expression that would slow the engine's batch or take too long to compile."""
    check_bounds(sum_of_bounds(pattern))


def sum_of_bounds(pattern: str) -> int:
    """Return the sum of the expression's bounds. Raises TooCostly when it would slow the engine's batch."""
    parser = _Parser(pattern)
    parser.parse()
    return parser.bounds


def check_bounds(bounds: int) -> None:
    """Raise TooCostly if the sum exceeds MAX_BOUNDS."""
    if bounds > MAX_BOUNDS:
        raise TooCostly(
            f"must have different lengths and repeats whose bounds add up to at most {MAX_BOUNDS}, not {bounds} (one "
            f"above {MAX_BOUND} counts as {MAX_BOUND}): use * and +, or fewer different lengths"
        )


class _Parser:
    """Parses an expression and estimates its cost."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self.bounds = 0

    def parse(self) -> None:
        """Parse the expression. Raises TooCostly."""
        while self._at < len(self._pattern):
            self._alternatives(0)
            # The engine refuses an unmatched parenthesis.
            self._at += 1

    def _alternatives(self, depth: int) -> Part:
        if depth > MAX_DEPTH:
            raise TooCostly(f"must nest groups at most {MAX_DEPTH} deep")
        branches = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence(depth))
        return one_of(branches)

    def _sequence(self, depth: int) -> Part:
        parts = []
        while self._peek() not in ("", "|", ")"):
            part = self._item(depth)
            while (repeat := self._repeat()) is not None:
                low, high = repeat
                bound = low if high is None else high
                self.bounds += min(bound, MAX_BOUND) if bound > 1 else 0
                part = repeated(part, low, high)
            parts.append(part)
        return joined(parts)

    def _item(self, depth: int) -> Part:
        match self._take():
            case "(":
                if self._peek() == "?":
                    self._group_kind()
                inner = self._alternatives(depth + 1)
                self._at += 1
                return inner._replace(single=False) if inner.single else inner
            case "[":
                return char_of(self._class())
            case "\\":
                return char_of(self._escape()[0])
            case ".":
                return _ANY
            case "^" | "$":
                return Part()
            case char:
                return literal(char)

    def _group_kind(self) -> None:
        """Skip what follows the parenthesis in (?:, (?=, (?!, (?<=, (?<!, (?<name> and (?P<name>."""
        self._at += 1
        if self._peek() == "P":
            self._at += 1
        kind = self._take()
        if kind == "<":
            if self._peek() in ("=", "!"):
                self._at += 1
            else:
                end = self._pattern.find(">", self._at)
                self._at = len(self._pattern) if end < 0 else end + 1

    def _class(self) -> int:
        chars, low, negated = 0, -1, self._peek() == "^"
        self._at += negated
        while (char := self._take()) not in ("", "]"):
            if char == "-" and low >= 0 and self._peek() not in ("", "]"):
                bits, high = self._class_item(self._take())
                # A set after the hyphen, as in [a-\d], forms no range.
                chars |= bits | (range_of(low, high) if high >= 0 else bits_of("-"))
                low = -1
            else:
                bits, low = self._class_item(char)
                chars |= bits
        return ALL & ~chars if negated else chars

    def _class_item(self, char: str) -> tuple[int, int]:
        """Return the characters of one item of a class, and its code point if it is one character, else -1."""
        return self._escape() if char == "\\" else (bits_of(char), ord(char))

    def _escape(self) -> tuple[int, int]:
        """Return what _class_item returns, for the escape after a backslash. An unknown one is any character."""
        char = self._take()
        if char.lower() in _CLASSES:
            chars = _CLASSES[char.lower()]
            return (chars if char.islower() else ALL & ~chars), -1
        code = ord(char) if char and not char.isalnum() else -1
        if char in _CONTROLS:
            code = ord(_CONTROLS[char])
        elif char == "c":
            code = ord(self._take() or "@") % 32
        elif char in ("x", "u"):
            code = self._code_point(2 if char == "x" else 4)
        elif char in ("p", "P") and self._peek() == "{":
            self._at = self._pattern.find("}", self._at) + 1 or len(self._pattern)
        return (range_of(code, code), code) if code >= 0 else (ALL, -1)

    def _code_point(self, digits: int) -> int:
        if self._peek() == "{":
            end = self._pattern.find("}", self._at)
            text, self._at = (self._pattern[self._at + 1 : end], end + 1) if end > 0 else ("", self._at)
        else:
            text = self._pattern[self._at : self._at + digits]
            self._at += len(text)
        try:
            code = int(text, 16)
        except ValueError:
            return -1
        return code if 0 <= code < 0x110000 else -1

    def _repeat(self) -> tuple[int, int | None] | None:
        """Consume a quantifier and return its bounds; None if there is none."""
        match self._peek():
            case "*":
                bounds: tuple[int, int | None] = (0, None)
            case "+":
                bounds = (1, None)
            case "?":
                bounds = (0, 1)
            case "{":
                end = self._pattern.find("}", self._at)
                low, comma, high = self._pattern[self._at + 1 : max(end, 0)].partition(",")
                # The engine refuses what is no quantifier, and bounds of more digits.
                if not (low or comma) or not (low + high).isdecimal() or len(low) > 9 or len(high) > 9:
                    return None
                self._at = end
                least = int(low or 0)
                bounds = (least, int(high) if high else (None if comma else least))
            case _:
                return None
        self._at += 1
        if self._peek() in ("?", "+"):
            self._at += 1
        return bounds

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        self._at += 1
        return char
