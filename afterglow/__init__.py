"""Afterglow: the Assistants API, self-hosted."""

__version__ = "0.1.0"
