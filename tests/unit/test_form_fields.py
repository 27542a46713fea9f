"""The forms of the console: what they may hold, and how much memory reading one takes."""

import tracemalloc
from urllib.parse import urlencode

import pytest

from services.http.console.form_fields import fields_of
from services.http.failures import Failure


@pytest.mark.parametrize("shift", range(4))
def test_a_text_is_decoded_as_it_was_encoded(shift: int) -> None:
    """Wherever its escapes are cut."""
    form = {"text": "x" * shift + "ß€ +%&=\n" * 20_000, "empty": ""}
    assert fields_of(urlencode(form).encode(), form) == form


def test_a_large_form_takes_little_more_memory_than_its_size() -> None:
    data = b"text=" + b"%41" * 350_000
    tracemalloc.start()
    fields_of(data, ["text"])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(data)


@pytest.mark.parametrize(
    ("data", "field"), [(b"text=a&text=b", "text"), (b"text=a&other=b", "other"), (b"text=a&%6Fther", "other")]
)
def test_a_field_is_known_and_there_once(data: bytes, field: str) -> None:
    with pytest.raises(Failure) as caught:
        fields_of(data, ["text"])
    assert [name for name, _ in caught.value.violations] == [field]


@pytest.mark.parametrize("data", [b"text=%FF", b"&".join([b"text="] * 101)])
def test_what_is_no_form_is_refused(data: bytes) -> None:
    with pytest.raises(Failure):
        fields_of(data, ["text"])
