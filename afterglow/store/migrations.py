"""The numbered scripts in `sql/`, which both databases share. How they are applied is in each store's file."""

from __future__ import annotations

from importlib import resources

from afterglow.errors import ConfigError


def migrations() -> dict[int, str]:
    """The scripts by their numbers."""
    folder = resources.files("afterglow.store") / "sql"
    return {int(file.name[:4]): file.read_text() for file in folder.iterdir() if file.name.endswith(".sql")}


def check_not_newer(version: int, place: str) -> None:
    """Raises ConfigError when a later release has changed the schema. place: what it has written."""
    if version > (newest := max(migrations())):
        raise ConfigError(f"The {place} was written by a newer Afterglow (schema {version}; this one knows {newest}).")
