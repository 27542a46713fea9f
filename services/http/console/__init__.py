"""The console: pages for people, rendered here, that work without JavaScript as far as a page can."""

from services.http.console.package import PREFIX, package

__all__ = ["PREFIX", "package"]
