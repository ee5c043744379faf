"""Ids say what they name, sort as they were made, and cannot be guessed."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow import ids
from afterglow.ids import ALPHABET, RANDOM_CHARS, TIME_CHARS, made_at, new_id


@pytest.mark.parametrize("prefix", ["asst", "thread", "msg", "run", "step", "call", "key"])
def test_an_id_is_its_prefix_and_24_characters(prefix: str):
    """Clients check the prefix; the rest is letters and digits alone."""
    assert re.fullmatch(rf"{prefix}_[0-9A-Za-z]{{24}}", new_id(prefix))


def test_ids_of_files_have_a_hyphen():
    """As they have in the original."""
    assert re.fullmatch(r"file-[0-9A-Za-z]{24}", new_id("file", "-"))


def test_an_id_says_when_it_was_made():
    """To the millisecond."""
    before = time.time()
    assert before - 0.001 <= made_at(new_id("run")) <= time.time()


def test_ids_are_different():
    """Among ten thousand made at once none is there twice."""
    assert len({new_id("msg") for _ in range(10_000)}) == 10_000


def test_the_alphabet_is_in_order():
    """62 characters in ASCII order, so that texts sort as numbers do."""
    assert len(set(ALPHABET)) == 62
    assert list(ALPHABET) == sorted(ALPHABET)


@given(st.lists(st.integers(0, 2**47), min_size=2))
def test_ids_sort_as_they_were_made(milliseconds: list[int]):
    """The time's characters of a later id are never less than those of an earlier one, for thousands of years."""
    made = [ids._base62(time, TIME_CHARS) for time in sorted(milliseconds)]
    assert made == sorted(made)
    assert all(len(text) == TIME_CHARS for text in made)


def test_an_id_begins_with_its_time(monkeypatch: pytest.MonkeyPatch):
    """A millisecond later is a later id, whatever chance says."""
    moments = iter([1_700_000_000_000_000_000 + step * 1_000_000 for step in range(200)])
    monkeypatch.setattr("time.time_ns", lambda: next(moments))
    made = [new_id("run") for _ in range(200)]
    assert made == sorted(made)


@given(st.integers(0, 2**95 - 1))
def test_chance_fits_into_its_place(number: int):
    """95 random bits need no more than 16 characters, and none is lost."""
    text = ids._base62(number, RANDOM_CHARS)
    assert len(text) == RANDOM_CHARS
    value = 0
    for character in text:
        value = value * 62 + ALPHABET.index(character)
    assert value == number
