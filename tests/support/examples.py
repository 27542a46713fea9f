"""How many examples hypothesis tries."""

from hypothesis import settings


def examples(number: int) -> settings:
    """Return the settings of a test that tries `number` examples, and a fifth of them in `make check`.

    hypothesis scales only tests that set no number: see the profiles of tests/conftest.py.
    """
    return settings(max_examples=max(1, number * settings().max_examples // 100))
