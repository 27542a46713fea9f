"""Exceptions that keep what they have come through."""


def forget_frames(error: BaseException | None) -> None:
    """Free what the frames of an exception and of those behind it hold, large requests say.

    A library that keeps an exception, with the call or the future that it ended, makes a cycle: its frames would stay
    until the garbage collector comes to them, which many large objects do not hasten.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
