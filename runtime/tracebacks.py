"""Frees the memory that the tracebacks of exceptions keep."""


def forget_frames(error: BaseException | None) -> None:
    """Free what the frames of an exception and of its context hold, large requests for example.

    A library that keeps an exception together with the call or the future that it ended creates a reference cycle. Its
    frames would stay until the garbage collector runs, and large objects do not make it run sooner.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__context__
