"""Whether a run may call its model once more, or a budget would be passed by that: of the run, or of its project.

Checked just before each call, with the call's estimated prompt on top of what is spent. What the answer will take is
not known then: a budget is passed by the answers of the calls that are at work at most. Calls of this process count
from their start (`Budgets`), those of other processes from their end.
"""

from __future__ import annotations

from typing import NamedTuple

from afterglow.contracts import House, Transaction
from afterglow.objects import Budget
from afterglow.prices import Price, money_text, nanos_of
from afterglow.rows.model_calls import get_run_cost
from afterglow.rows.runs import RunAsked, RunRow
from afterglow.rows.spend import DAY_S, NOTHING, Amount, sum_spend

_FEMTOS_PER_NANO = 1_000_000


class Limit(NamedTuple):
    """One limit. of: whose it is, in words. most, spent: tokens, or billionths of money."""

    of: str
    money: bool
    most: int
    spent: int


class NextCall(NamedTuple):
    """The call that is about to be made. tokens: of its prompt, estimated. price: of its model."""

    tokens: int
    price: Price

    @property
    def nanos(self) -> int:
        return (self.price.prompt or 0) * self.tokens // _FEMTOS_PER_NANO


class Budgets:
    """What the calls that one process has at work are going to take of their projects' budgets."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._held: dict[str, dict[str, Amount]] = {}
        self._past: dict[str, tuple[int, Amount]] = {}  # what each project had spent before a day

    async def why_not(self, row: RunRow, budget: Budget, call: NextCall) -> str | None:
        """Why the call may not be made, in words for the run's owner. One that may counts until `release`."""
        if not _is_limited(row.asked, budget):
            return None
        project, run_id = row.project, row.run.id
        past = self._past.get(project)

        async def look(tx: Transaction) -> tuple[list[Limit], tuple[int, Amount] | None]:
            known = await _before_today(tx, self._house, project, budget, past)
            return await limits_of(tx, self._house, row, budget, known), known

        limits, known = await self._house.store.read(look)
        if known is not None:
            self._past[project] = known
        held = self._held.setdefault(project, {})
        others = NOTHING
        for other, amount in held.items():
            others = others if other == run_id else others.plus(amount)
        if why := refusal(limits, call, row.run.model, self._house.settings.currency, others):
            return why
        held[run_id] = Amount(call.tokens, call.nanos)
        return None

    def release(self, row: RunRow) -> None:
        """The run's call is over, or recorded."""
        held = self._held.get(row.project)
        if held is not None:
            held.pop(row.run.id, None)
            if not held:
                del self._held[row.project]


def _is_limited(asked: RunAsked, budget: Budget) -> bool:
    return asked.max_total_tokens is not None or asked.max_cost is not None or budget != Budget()


async def _before_today(
    tx: Transaction, house: House, project: str, budget: Budget, past: tuple[int, Amount] | None
) -> tuple[int, Amount] | None:
    """What was spent before today is summed once a day; None when nobody asks."""
    today = int(house.clock.now()) // DAY_S
    if budget.total_tokens is None and budget.total_cost is None:
        return None
    if past is not None and past[0] == today:
        return past
    return today, await sum_spend(tx, project, house.settings.currency, before_day=today)


async def limits_of(
    tx: Transaction, house: House, row: RunRow, budget: Budget, past: tuple[int, Amount] | None = None
) -> list[Limit]:
    """The limits that hold for a run, with what is spent of each. past: what the project had spent before today."""
    project, asked, currency = row.project, row.asked, house.settings.currency
    past = past or await _before_today(tx, house, project, budget, None)
    used = row.spent.prompt_tokens + row.spent.completion_tokens
    limits = [_tokens("this run", most, used) for most in (asked.max_total_tokens, budget.run_tokens)]
    if asked.max_cost is not None or budget.run_cost is not None:
        cost = await get_run_cost(tx, project, row.run.id, currency)
        limits += [_money("this run", most, cost) for most in (asked.max_cost, budget.run_cost)]
    if any(most is not None for most in (budget.day_tokens, budget.day_cost)) or past is not None:
        today = int(house.clock.now()) // DAY_S
        day = await sum_spend(tx, project, currency, from_day=today)
        total = day.plus(past[1]) if past is not None else day
        limits += [
            _tokens("this project for today (UTC)", budget.day_tokens, day.tokens),
            _money("this project for today (UTC)", budget.day_cost, day.nanos),
            _tokens("this project", budget.total_tokens, total.tokens),
            _money("this project", budget.total_cost, total.nanos),
        ]
    return [limit for limit in limits if limit is not None]


def _tokens(of: str, most: int | None, spent: int) -> Limit | None:
    return None if most is None else Limit(of, False, most, spent)


def _money(of: str, most: float | None, spent: int) -> Limit | None:
    return None if most is None else Limit(of, True, nanos_of(most), spent)


def refusal(limits: list[Limit], call: NextCall, model: str, currency: str, others: Amount = NOTHING) -> str | None:
    """The first limit that the call would pass, in words. others: what calls at work are going to take of the
    project's."""
    for limit in limits:
        if limit.money and not call.price.whole:
            return (
                f"The model '{model}' has no price here, so it cannot be called within the budget of {limit.of}, which"
                " is one of money. The operator can set prompt_price and completion_price for it."
            )
        taken = others if limit.of != "this run" else NOTHING
        next_one = call.nanos + taken.nanos if limit.money else call.tokens + taken.tokens
        if limit.spent + next_one > limit.most:
            return _words(limit, next_one, currency)
    return None


def _words(limit: Limit, next_one: int, currency: str) -> str:
    def said(amount: int) -> str:
        return f"{money_text(amount)} {currency}" if limit.money else f"{amount} tokens"

    return (
        f"The budget of {limit.of} would be passed: it is {said(limit.most)}, {said(limit.spent)} are spent, and the"
        f" prompt of the next call of the model takes about {said(next_one)} more."
    )
