"""The steps that a reader of a pipeline has, as its cursor tells them.

A version alone does not tell them: a crash may take back what a reader has got, and the same version is another tree
then.
"""

import zlib
from collections.abc import Mapping
from typing import Final

from llm_pb import internal_pb2

_BYTES: Final = 2
"""Bytes of the check of a node. With 1,000 nodes a cursor has room for two each."""
_NONE: Final = bytes(_BYTES)
_PATHS: Final = 1 << 32


class SentSteps:
    """What a reader has of the steps of a pipeline."""

    def __init__(self) -> None:
        self._nodes: dict[int, internal_pb2.PipelineNode] = {}
        self._checks = bytearray()
        self._paths = 0
        self._has_others = False

    @classmethod
    def of_cursor(
        cls, cursor: internal_pb2.PipelineCursor, nodes: Mapping[int, internal_pb2.PipelineNode]
    ) -> "SentSteps":
        """Return what the reader of a cursor has of these nodes."""
        sent, checks = cls(), cursor.steps
        for number in range(len(checks) // _BYTES):
            check = checks[number * _BYTES : (number + 1) * _BYTES]
            if check == _NONE:
                continue
            if (node := nodes.get(number)) is None:
                break
            sent._add(node, check)
            if node.version > cursor.version or check != _check(node):
                del sent._nodes[number]
        sent._has_others = sent._paths != cursor.paths
        return sent

    def has(self, node: internal_pb2.PipelineNode) -> bool:
        """Return whether the reader has this very node."""
        return self._nodes.get(node.number) is node

    def are_among(self, nodes: Mapping[int, internal_pb2.PipelineNode]) -> bool:
        """Return whether each step that the reader has is one of these nodes."""
        if self._has_others or not self._nodes.keys() <= nodes.keys():
            return False
        known = ((node, nodes[number]) for number, node in self._nodes.items())
        return all(node is now or node.step.path == now.step.path for node, now in known)

    def add(self, node: internal_pb2.PipelineNode) -> None:
        """Note that the reader gets a node."""
        self._add(node, _check(node))

    def note(self, cursor: internal_pb2.PipelineCursor) -> None:
        """Note in a cursor what the reader has."""
        cursor.steps, cursor.paths = bytes(self._checks), self._paths

    def _add(self, node: internal_pb2.PipelineNode, check: bytes) -> None:
        place = slice(node.number * _BYTES, (node.number + 1) * _BYTES)
        if self._checks[place] in (b"", _NONE):
            self._paths = (self._paths + zlib.crc32(node.step.path.encode())) % _PATHS
        self._checks.extend(bytes(max(place.stop - len(self._checks), 0)))
        self._checks[place] = check
        self._nodes[node.number] = node


def _check(node: internal_pb2.PipelineNode) -> bytes:
    """Return the check of a node, which is not _NONE."""
    found = zlib.crc32(node.step.SerializeToString(deterministic=True))
    return (found % 0xFFFF + 1).to_bytes(_BYTES)
