"""Errors: what their docstrings promise of the wire is what is sent."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from afterglow.errors import ApiError

WIRE = re.compile(r"Wire: HTTP ([0-9]{3})(?:, type `([a-z_]+)`)?")


def documented(kind: type[ApiError] = ApiError) -> Iterator[type[ApiError]]:
    for below in kind.__subclasses__():
        if WIRE.search(below.__doc__ or ""):
            yield below
        yield from documented(below)


@pytest.mark.parametrize("kind", list(documented()), ids=lambda kind: kind.__name__)
def test_an_error_is_sent_as_documented(kind: type[ApiError]):
    """The status, and the type where one is named, are the class's."""
    found = WIRE.search(" ".join((kind.__doc__ or "").split()))
    assert found is not None
    assert kind.status == int(found[1])
    assert found[2] in (None, kind.type)
