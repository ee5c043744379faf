"""Ledgers and prices: whatever was reported, the parts add up to it, and money is exact."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterglow.objects import CompletionTokensDetails, PromptTokenDetails, Usage
from afterglow.prices import NANOS, Price, cost_of, money_text, nanos_of, price_of
from afterglow.rows.model_calls import MILLION, ModelCall
from afterglow.runs.context import Turn, history_tokens
from afterglow.runs.ledger import PARTS, LedgerLine, calibrated, ledger_of, nanos_in
from afterglow.settings import ModelSettings

COUNT = st.integers(0, 10**9)
STORED = ("instructions", "tools", "response_format", "history", "retrieved_chunks", "tool_results", "images")
USAGES = st.builds(
    lambda prompt, cached, completion, reasoning, more: Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion + more,
        prompt_token_details=PromptTokenDetails(cached),
        completion_tokens_details=CompletionTokensDetails(reasoning),
    ),
    *[COUNT] * 5,
)
CALLS = st.builds(
    lambda estimated, factor, counted, reported, cost: ModelCall(
        id="mcall_1",
        thread_id="thread_1",
        run_id="run_1",
        attempt=1,
        created_at=1,
        model_asked="m",
        cut_off=1,
        kept_from=0,
        budget_tokens=1,
        estimated=estimated,
        prompt_hash="",
        factor=factor,
        counted=counted,
        usage={} if reported else None,
        cost=cost,
        currency="USD",
    ),
    st.dictionaries(st.sampled_from(STORED), COUNT),
    st.integers(MILLION // 2, 3 * MILLION),
    USAGES,
    st.booleans(),
    st.none() | COUNT,
)


def adds_up(line: LedgerLine) -> None:
    assert line.prompt.total == line.usage.prompt_tokens
    assert line.completion.output + line.completion.reasoning == line.usage.completion_tokens
    assert line.cached_tokens == line.usage.prompt_token_details.cached_tokens


@settings(max_examples=60)
@given(st.lists(CALLS, max_size=3), st.none() | USAGES)
def test_every_ledger_adds_up(calls: list[ModelCall], spent: Usage | None):
    """Of each call and of all, the parts and their remainder are what was counted; the run's line is the run's usage,
    and what no call accounts for is stated."""
    ledger = ledger_of("run_1", "thread_1", calls, spent)
    for line in (*ledger.data, ledger.total):
        adds_up(line)
    counted = Usage()
    for call in calls:
        assert call.counted is not None
        counted = counted.plus(call.counted)
    assert ledger.total.usage == (counted if spent is None else spent)
    assert counted.plus(ledger.unrecorded or Usage()) == ledger.total.usage
    for part in PARTS:
        assert getattr(ledger.total.prompt, part) == sum(getattr(line.prompt, part) for line in ledger.data)
    costs = [call.cost for call in calls if call.cost is not None]
    assert (ledger.total.cost and nanos_in(ledger.total.cost)) == (sum(costs) if costs else None)


def test_what_was_estimated_says_so():
    """A call whose server has reported nothing is marked; one that was counted with nothing is not."""
    fields: dict[str, Any] = {"thread_id": "t", "run_id": "r", "attempt": 1, "created_at": 1, "model_asked": "m"}
    fields |= {"cut_off": 1, "kept_from": 0, "budget_tokens": 0, "prompt_hash": ""}
    guessed = ModelCall(id="a", counted=Usage(prompt_tokens=3, total_tokens=3), **fields)
    interrupted = ModelCall(id="b", counted=Usage(), estimated={"history": 40}, **fields)
    old = ModelCall(id="c", usage={"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9, "odd": {}}, **fields)
    ledger = ledger_of("r", "t", [guessed, interrupted, old], None)
    assert [line.estimated for line in ledger.data] == [True, False, False]
    assert ledger.data[1].prompt.remainder == -40
    assert ledger.total.usage == Usage(prompt_tokens=10, completion_tokens=2, total_tokens=12)
    assert ledger.total.estimated


@given(st.dictionaries(st.sampled_from(STORED), COUNT), st.integers(MILLION // 2, 3 * MILLION))
def test_calibration_is_the_same_for_every_part(estimated: dict[str, int], factor: int):
    """Each part is its estimate times the factor, to the nearest token."""
    parts = calibrated(estimated, factor)
    assert list(parts) == list(PARTS)
    for name, stored in zip(PARTS, STORED, strict=True):
        assert abs(parts[name] * MILLION - estimated.get(stored, 0) * factor) <= MILLION // 2


@given(st.lists(st.tuples(*[st.integers(0, 1000)] * 4), max_size=5))
def test_history_is_what_is_nothing_else(sizes: list[tuple[int, int, int, int]]):
    """The parts of a history sum to its turns."""
    turns = [
        Turn((1, 1), "t", "user", [], sum(size), images=size[1], results=size[2], retrieved=size[3]) for size in sizes
    ]
    parts = history_tokens(turns)
    assert parts == {
        "history": sum(size[0] for size in sizes),
        "images": sum(size[1] for size in sizes),
        "tool_results": sum(size[2] for size in sizes),
        "retrieved_chunks": sum(size[3] for size in sizes),
    }


# --- money -----------------------------------------------------------------------------------------------------

PRICES = st.decimals(0, 10_000, places=6).map(float)


@given(st.none() | PRICES, st.none() | PRICES, st.none() | PRICES, USAGES)
def test_costs_are_exact(prompt: float | None, cached: float | None, completion: float | None, usage: Usage):
    """A cost is the sum of tokens times price, to the billionth; tokens without a price are counted apart."""
    told = ModelSettings(prompt_price=prompt, cached_price=cached, completion_price=completion)
    cost = cost_of(price_of({"m": told}, ["other", "m"]), usage)
    if prompt is None and completion is None:
        assert cost == (None, usage.prompt_tokens + usage.completion_tokens)
        return
    of_cache = min(usage.prompt_token_details.cached_tokens, usage.prompt_tokens)
    cached = prompt if cached is None else cached
    exact, unpriced = Decimal(0), 0
    for price, tokens in (
        (prompt, usage.prompt_tokens - of_cache),
        (cached, of_cache),
        (completion, usage.completion_tokens),
    ):
        if price is None:
            unpriced += tokens
        else:
            exact += Decimal(str(price)) * tokens / 1_000_000
    assert cost.unpriced_tokens == unpriced
    assert cost.nanos is not None
    assert abs(Decimal(cost.nanos) / NANOS - exact) <= Decimal(1) / NANOS / 2


@given(st.integers(-(10**18), 10**18))
def test_money_as_text_is_exact(nanos: int):
    """The text of an amount is its decimal, and an amount that is written is read back."""
    assert Decimal(money_text(nanos)) * NANOS == nanos
    assert "e" not in money_text(nanos).lower()


@given(st.integers(0, 10**15))
def test_amounts_survive_floats(nanos: int):
    """As long as it is below a million, an amount as a JSON number is the amount."""
    assert nanos_of(nanos / NANOS) == nanos


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["gpt-4o", "gpu/qwen"], 1_000_000_000),
        (["window-only", "gpu/qwen", "qwen"], 2_000_000_000),
        (["unknown"], None),
    ],
)
def test_the_first_name_with_a_price_counts(names: list[str], found: int | None):
    """A model's price is that of the first of its names that has one."""
    models = {
        "gpt-4o": ModelSettings(prompt_price=1),
        "window-only": ModelSettings(window_tokens=1),
        "gpu/qwen": ModelSettings(prompt_price=2),
    }
    assert price_of(models, names).prompt == found
    assert not price_of(models, names).whole
    assert Price(1, 1, 1).whole
