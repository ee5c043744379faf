"""What is wrong with a request to /files, in the words of its older validator, which has no codes.

The words of all other routes are in `api/faults.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from afterglow.api.faults import shown
from afterglow.errors import InvalidRequest

INTEGER = re.compile(r"-?[0-9]{1,100}")


def missing(name: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' is a required property")


def unexpected(name: str) -> InvalidRequest:
    return InvalidRequest(f"Additional properties are not allowed ({shown(name)!r} was unexpected)")


def given_twice(name: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' was given more than once")


def not_of_type(value: str, kind: str, name: str) -> InvalidRequest:
    return InvalidRequest(f"{shown(value)!r} is not of type '{kind}' - '{name}'")


def too_long(value: str, name: str) -> InvalidRequest:
    return InvalidRequest(f"{shown(value)!r} is too long - '{name}'")


def check_choice(value: str, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        raise InvalidRequest(f"{shown(value)!r} is not one of {list(choices)!r} - '{name}'", param=name)


def read_integer(text: str, low: int, high: int, name: str) -> int:
    """Both ends are allowed values."""
    if not INTEGER.fullmatch(text):
        raise not_of_type(text, "integer", name)
    value = int(text)
    if value < low:
        raise InvalidRequest(f"{value} is less than the minimum of {low} - '{name}'")
    if value > high:
        raise InvalidRequest(f"{value} is greater than the maximum of {high} - '{name}'")
    return value
