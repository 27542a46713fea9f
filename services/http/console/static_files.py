"""The files that pages load: styles, modules, icons."""

import hashlib
from dataclasses import dataclass
from http import HTTPStatus
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from services.http.failures import Failure

_TYPES: Final = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@dataclass(frozen=True)
class StaticFiles:
    """All files. Their paths hold a digest of them all, so that a browser may keep them."""

    contents: dict[str, bytes]
    """The files by name."""
    version: str
    """The digest, in hexadecimal digits."""

    @classmethod
    def load(cls) -> "StaticFiles":
        """Return the files of the package."""
        folder = files("services.http.console") / "static"
        contents = {
            file.name: file.read_bytes()
            for file in sorted(folder.iterdir(), key=lambda file: file.name)
            if file.name.rpartition(".")[2] in _TYPES
        }
        digest = hashlib.sha256()
        for name, data in contents.items():
            digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        return cls(contents, digest.hexdigest()[:16])

    def path(self, name: str) -> str:
        """Return the path of a file. Raises KeyError when there is none."""
        self.contents[name]
        return f"/console/static/{self.version}/{name}"

    async def answer(self, request: Request) -> Response:
        """Answer with a file. Raises Failure, 404. While fronts are replaced, a page may ask for another version."""
        version, name = request.path_params["version"], request.path_params["name"]
        if name not in self.contents:
            raise Failure(HTTPStatus.NOT_FOUND, "there is nothing at this path", "PATH_NOT_FOUND")
        keep = "public, max-age=31536000, immutable" if version == self.version else "no-store"
        headers = {"Cache-Control": keep, "X-Content-Type-Options": "nosniff"}
        return Response(self.contents[name], headers=headers, media_type=_TYPES[name.rpartition(".")[2]])
