"""Ids: a prefix that clients check, then 24 characters that begin with the time.

Ours sort by creation (milliseconds, then chance), which keeps index writes together; to everyone else they are
opaque. Ids of other shapes are legal when imported.
"""

from __future__ import annotations

import secrets
import time

# In ASCII order, so that ids of one kind sort as their times do.
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TIME_CHARS = 8
RANDOM_CHARS = 16


def new_id(prefix: str, sign: str = "_") -> str:
    """Return e.g. `msg_0V4kXw3q…`: prefix, 8 characters of time in ms (until the year 8,800), 16 of chance.

    sign: between the two; ids of files have a hyphen there.
    """
    return (
        f"{prefix}{sign}{_base62(time.time_ns() // 1_000_000, TIME_CHARS)}{_base62(secrets.randbits(95), RANDOM_CHARS)}"
    )


def made_at(object_id: str) -> float:
    """When an id of ours was made: Unix seconds, to the millisecond."""
    number = 0
    for digit in object_id[-TIME_CHARS - RANDOM_CHARS : -RANDOM_CHARS]:
        number = number * 62 + ALPHABET.index(digit)
    return number / 1000


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))
