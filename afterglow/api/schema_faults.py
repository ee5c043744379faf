"""What is wrong with a request to /files or /uploads, in the words of their older validator, which has no codes.

The words of all other routes are in `api/faults.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from msgspec import Struct, inspect

from afterglow.api.faults import as_declared, check_text, shown
from afterglow.errors import InvalidRequest

INTEGER = re.compile(r"-?[0-9]{1,100}")


def missing(name: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' is a required property")


def unexpected(name: str) -> InvalidRequest:
    return InvalidRequest(f"Additional properties are not allowed ({shown(name)!r} was unexpected)")


def given_twice(name: str) -> InvalidRequest:
    return InvalidRequest(f"'{name}' was given more than once")


def not_of_type(value: Any, kind: str, name: str) -> InvalidRequest:
    return InvalidRequest(f"{_shown(value)} is not of type '{kind}' - '{name}'")


def _shown(value: Any) -> str:
    return repr(shown(value)) if isinstance(value, str) else shown(repr(value))


def too_long(value: str, name: str) -> InvalidRequest:
    return InvalidRequest(f"{shown(value)!r} is too long - '{name}'")


def check_choice(value: Any, choices: Sequence[Any], name: str) -> None:
    if value not in choices:
        raise InvalidRequest(f"{_shown(value)} is not one of {list(choices)!r} - '{name}'", param=name)


def read_integer(text: str, low: int, high: int, name: str) -> int:
    """Both ends are allowed values."""
    if not INTEGER.fullmatch(text):
        raise not_of_type(text, "integer", name)
    check_range(int(text), low, high, name)
    return int(text)


def check_range(value: int, low: int, high: int, name: str) -> None:
    if value < low:
        raise InvalidRequest(f"{_shown(value)} is less than the minimum of {low} - '{name}'")
    if value > high:
        raise InvalidRequest(f"{_shown(value)} is greater than the maximum of {high} - '{name}'")


# --- JSON bodies -----------------------------------------------------------------------------------------------


def check_shape(kind: type[Struct], plain: Any) -> None:
    """Raise InvalidRequest for the first thing in `plain` (as read by json) that is no `kind`."""
    _check(inspect.type_info(kind), plain, "")


def _check(shape: inspect.Type, value: Any, name: str) -> None:
    options = shape.types if isinstance(shape, inspect.UnionType) else (shape,)
    if value is None and any(isinstance(option, inspect.NoneType) for option in options):
        return
    match options[0]:
        case inspect.LiteralType(values=values):
            check_choice(value, as_declared(values), name)
        case inspect.StrType(min_length=low):
            _check_string(value, low or 0, name)
        case inspect.IntType(ge=int(low), le=int(high)):
            if type(value) is not int:
                raise not_of_type(value, "integer", name)
            check_range(value, low, high, name)
        case inspect.ListType(item_type=item, min_length=low, max_length=high):
            _check_array(value, low or 0, high or len(value), name)
            for index, one in enumerate(value):
                _check(item, one, f"{name}.{index}")
        case inspect.StructType() as struct:
            _check_object(struct, value, name)


def _check_string(value: Any, low: int, name: str) -> None:
    if not isinstance(value, str):
        raise not_of_type(value, "string", name)
    check_text(value, name)
    if len(value) < low:
        raise InvalidRequest(f"{_shown(value)} is too short - '{name}'")


def _check_array(value: Any, low: int, high: int, name: str) -> None:
    if not isinstance(value, list):
        raise not_of_type(value, "array", name)
    if len(value) < low:
        raise InvalidRequest(f"{_shown(value)} is too short - '{name}'")
    if len(value) > high:
        raise InvalidRequest(f"{_shown(value)} is too long - '{name}'")


def _check_object(struct: inspect.StructType, value: Any, name: str) -> None:
    if not isinstance(value, dict):
        raise not_of_type(value, "object", name)
    fields = {field.encode_name: field for field in struct.fields}
    for key in value:
        if key not in fields:
            raise unexpected(key)
    for key, field in fields.items():
        if key in value:
            _check(field.type, value[key], f"{name}.{key}" if name else key)
        elif field.required:
            raise missing(key)
