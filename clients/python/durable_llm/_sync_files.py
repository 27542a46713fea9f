"""The files of Client: AsyncFiles for code without asyncio."""

import os
from collections.abc import AsyncGenerator, Coroutine, Generator
from typing import Any, Protocol, TypeVar

from durable_llm._files import AsyncFiles, Content
from llm_pb import file_pb2

T = TypeVar("T")


class _Runner(Protocol):
    def run(self, coroutine: Coroutine[Any, Any, T]) -> T: ...

    def iterate(self, items: AsyncGenerator[T, None]) -> Generator[T, None, None]: ...


class Files:
    """AsyncFiles for code without asyncio."""

    def __init__(self, loop: _Runner, files: AsyncFiles) -> None:
        self._loop = loop
        self._files = files

    def upload(self, content: Content, **fields: Any) -> file_pb2.File:
        """See AsyncFiles.upload."""
        return self._loop.run(self._files.upload(content, **fields))

    def content(self, file_id: str, offset: int = 0, limit: int = 0) -> Generator[bytes, None, None]:
        """See AsyncFiles.content."""
        return self._loop.iterate(self._files.content(file_id, offset, limit))

    def download(self, file_id: str, path: str | os.PathLike[str]) -> file_pb2.File:
        """See AsyncFiles.download."""
        return self._loop.run(self._files.download(file_id, path))

    def get(self, file_id: str) -> file_pb2.File:
        """See AsyncFiles.get."""
        return self._loop.run(self._files.get(file_id))

    def list(self, **filters: Any) -> Generator[file_pb2.File, None, None]:
        """See AsyncFiles.list."""
        return self._loop.iterate(self._files.list(**filters))

    def delete(self, file_id: str) -> None:
        """See AsyncFiles.delete."""
        self._loop.run(self._files.delete(file_id))
