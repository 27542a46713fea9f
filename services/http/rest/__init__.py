"""REST: jobs as resources, in the JSON of llm.proto, with errors as application/problem+json."""

from services.http.rest.package import package

__all__ = ["package"]
