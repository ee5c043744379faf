"""What tokens cost: the operator's prices as whole numbers, and exact sums of money. Pure.

Money is counted in billionths of the currency, as whole numbers, so that sums are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import NamedTuple

from afterglow.objects import Usage
from afterglow.settings import ModelSettings

NANOS = 1_000_000_000
_FEMTOS = 1_000_000_000  # per million tokens and unit of money: so many 10⁻¹⁵ per token
_FEMTOS_PER_NANO = 1_000_000


class Price(NamedTuple):
    """Of one token, in 10⁻¹⁵ of the currency; None where the operator names none. cached: of prompt tokens that the
    provider had cached."""

    prompt: int | None = None
    cached: int | None = None
    completion: int | None = None

    @property
    def whole(self) -> bool:
        """Whether every token has a price."""
        return self.prompt is not None and self.completion is not None


class Cost(NamedTuple):
    """nanos: billionths of the currency, None when nothing has a price. unpriced_tokens: those that are not in it."""

    nanos: int | None
    unpriced_tokens: int


def price_of(models: Mapping[str, ModelSettings], names: Iterable[str]) -> Price:
    """The price of a model: of the first of its names that the settings know a price for."""
    for name in names:
        told = models.get(name)
        if told and (told.prompt_price is not None or told.completion_price is not None):
            cached = told.prompt_price if told.cached_price is None else told.cached_price
            return Price(_femtos(told.prompt_price), _femtos(cached), _femtos(told.completion_price))
    return Price()


def _femtos(per_million: float | None) -> int | None:
    return None if per_million is None else round(Decimal(str(per_million)) * _FEMTOS)


def cost_of(price: Price, usage: Usage) -> Cost:
    """What a call has cost, rounded to the nearest billionth."""
    cached = max(min(usage.prompt_token_details.cached_tokens, usage.prompt_tokens), 0)
    femtos, unpriced, priced = 0, 0, False
    for each, tokens in (
        (price.prompt, usage.prompt_tokens - cached),
        (price.cached, cached),
        (price.completion, usage.completion_tokens),
    ):
        if each is None:
            unpriced += tokens
        else:
            priced = True
            femtos += each * tokens
    return Cost((femtos + _FEMTOS_PER_NANO // 2) // _FEMTOS_PER_NANO if priced else None, unpriced)


def nanos_of(money: float) -> int:
    """An amount as it is written, in billionths."""
    return round(Decimal(str(money)) * NANOS)


def money_text(nanos: int) -> str:
    """An amount as an exact decimal without needless zeros: `0.0125`."""
    text = f"{abs(nanos) // NANOS}.{abs(nanos) % NANOS:09d}".rstrip("0").rstrip(".")
    return f"-{text}" if nanos < 0 else text
