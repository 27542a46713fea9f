"""A step of a pipeline."""

from llm_pb import common_pb2


class Step:
    """A step while it runs."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.usage = common_pb2.Usage()
        """What the step has used. It counts when the step ends."""
        self.cancelled = False
        """Whether a cancel came while the step's workflow was being started. The step's task does not tell of it."""
