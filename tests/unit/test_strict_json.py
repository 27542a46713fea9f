"""JSON of callers: what is refused says why."""

import pytest

from jobs.strict_json import NoObject, read_object


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"temperature": NaN}', "is no JSON: NaN is no number"),
        (b'{"temperature": -Infinity}', "is no JSON: -Infinity is no number"),
        (b'{"a": "\xe9"}', "is no UTF-8 from byte 7 on"),
        ('{"a": 1}'.encode("utf-16"), "is no UTF-8 from byte 0 on"),
        ('{"a": 1}'.encode("utf-32-le"), "is no JSON: "),
        (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}", "is nested too deeply"),
        (b'{"a": [' + b"1," * 20_000 + b"1]}", "holds more than 20000 values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "holds a number of too many digits"),
        (b'{"\\ud800": 1}', "has a key with half a surrogate pair"),
    ],
)
def test_what_cannot_be_read_names_the_cause(text: bytes, words: str) -> None:
    with pytest.raises(NoObject) as refused:
        read_object(text)
    assert str(refused.value).startswith(words)


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert read_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
