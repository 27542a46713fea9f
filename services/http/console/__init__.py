"""The console: pages for people, rendered here, that work without JavaScript as far as a page can."""

from services.http.console.package import package

__all__ = ["package"]
