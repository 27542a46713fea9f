r"""What a regular expression would cost the engine at every token, judged by its form before anything compiles it.

A structured job is constrained in the step that all jobs of a batch share: xgrammar, vLLM's backend, works out which
tokens may follow. It keeps every way in which the text so far can be read, so what costs is ambiguity: a repeat in a
repeat with nothing that must stand between two rounds. Measured with xgrammar 0.2.8, a vocabulary of 131,000 tokens,
one core of a busy machine, in milliseconds a token (mean of the first 100 to 200 tokens, and the worst):

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

The judgement is of the form alone, in time that grows with the expression's length, which its caller bounds. It errs
to both sides: `("([^"]|"")*",)*`, CSV with doubled quotes, costs 0.02 ms a token and is refused, because the judgement
does not see that a quote inside never stands alone. So the engine has a guard, too
(services.gpu_worker.engines.structured_guard). What it cannot read it leaves to the engine, which refuses what it
cannot compile. An expression is read as xgrammar reads it, close to JavaScript, and not as Python's `re` does: the two
differ in where a class ends and in flags, and what one takes for a comment or for characters can be a repeat to the
other.
"""

from typing import Final

from jobs.regex_parts import ALL, DIGITS, Part, TooCostly, bits_of, char_of, joined, literal, one_of, range_of, repeated

MAX_DEPTH: Final = 32
"""Groups within groups."""
MAX_BOUNDS: Final = 1024
"""Sum of the bounds of all repeats and lengths of one job: compiling takes up to 15 ms for each."""
MAX_BOUND: Final = 128
"""What one repeat adds to that sum at most: a longer one compiles in about the same time."""

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
    """Return what the expression adds to MAX_BOUNDS. Raises TooCostly when it would slow the engine's batch."""
    parser = _Parser(pattern)
    parser.parse()
    return parser.bounds


def check_bounds(bounds: int) -> None:
    """Raise TooCostly for more than MAX_BOUNDS."""
    if bounds > MAX_BOUNDS:
        raise TooCostly(
            f"must have different lengths and repeats whose bounds add up to at most {MAX_BOUNDS}, one of more than "
            f"{MAX_BOUND} counted as {MAX_BOUND}, not {bounds}: use * and +, or the same length more often"
        )


class _Parser:
    """Reads an expression and judges it on the way."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0
        self.bounds = 0

    def parse(self) -> None:
        """Raise TooCostly where the expression is."""
        while self._at < len(self._pattern):
            self._alternatives(0)
            # A parenthesis too many is for the engine to refuse.
            self._at += 1

    def _alternatives(self, depth: int) -> Part:
        if depth > MAX_DEPTH:
            raise TooCostly(f"must have at most {MAX_DEPTH} groups in each other")
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
                return inner._replace(single=False)
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
                # A set after the hyphen, as in [a-\d], makes no range.
                chars |= bits | (range_of(low, high) if high >= 0 else bits_of("-"))
                low = -1
            else:
                bits, low = self._class_item(char)
                chars |= bits
        return ALL & ~chars if negated else chars

    def _class_item(self, char: str) -> tuple[int, int]:
        """Return the characters of one item of a class, and the code of it where it is one character, else -1."""
        return self._escape() if char == "\\" else (bits_of(char), ord(char))

    def _escape(self) -> tuple[int, int]:
        """Return what _class_item does of what follows a backslash; all characters for what is not known."""
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
        """Take a quantifier and return its bounds; None where there is none."""
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
                # What is no quantifier is for the engine to refuse; more digits than that, too.
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
