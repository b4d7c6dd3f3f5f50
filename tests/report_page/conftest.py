"""The browser for the tests of pages."""

from browser import in_browser

__all__ = ["in_browser"]
