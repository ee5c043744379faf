"""Whether a run may call its model once more, or a budget would be passed by that: of the run, or of its project.

Checked just before each call, with the call's estimated prompt on top of what is spent. What the answer will take is
not known then: a budget is passed by the answers of the calls that are at work at most. Calls of this process count
from their start (`Budgets`), those of other processes from their end.

What a project has spent is summed from its rows: for the days before once a day, for today as often as costs no more
than a twentieth of a reader's time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from afterglow.contracts import House, Transaction
from afterglow.objects import DAY_S, Budget, PromptTokenDetails, Usage
from afterglow.prices import Price, cost_of, money_text, nanos_of
from afterglow.rows.model_calls import get_run_cost
from afterglow.rows.runs import RunAsked, RunRow
from afterglow.rows.spend import NOTHING, Amount, sum_spend

REREAD_AFTER = 20  # times as long as it took to read


class ProjectSpent(NamedTuple):
    """What a project has spent. day: since 1970, UTC; before: up to it, None when nobody has asked."""

    day: int
    today: Amount
    before: Amount | None


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
    def amount(self) -> Amount:
        return Amount(self.tokens, cost_of(self.price, Usage(prompt_tokens=self.tokens)).nanos or 0)


class _Held(NamedTuple):
    """A call at work. spent: by its run, before it."""

    call: NextCall
    spent: Usage


@dataclass(slots=True)
class _Known:
    """What is known of a project's spending. since: by calls of this process that have ended since it was read."""

    spent: ProjectSpent
    read_at: float
    took_s: float
    since: Amount = NOTHING
    held: dict[str, _Held] = field(default_factory=dict)

    def is_fresh(self, day: int, budget: Budget) -> bool:
        if self.spent.day != day or (_is_total(budget) and self.spent.before is None):
            return False
        return time.monotonic() < self.read_at + REREAD_AFTER * self.took_s

    @property
    def now(self) -> ProjectSpent:
        return self.spent._replace(today=self.spent.today.plus(self.since))


class Budgets:
    """What the runs of this process have spent and are about to spend of their projects' budgets."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._known: dict[str, _Known] = {}

    async def why_not(self, row: RunRow, budget: Budget, call: NextCall) -> str | None:
        """Why the call may not be made, in words for the run's owner. One that may counts until `release`."""
        run_nanos, known, others = 0, None, NOTHING
        if row.asked.max_cost is not None or budget.run_cost is not None:
            run_nanos = await self._house.store.read(lambda tx: run_cost(tx, self._house, row))
        if _is_of_project(budget):
            known = await self._project(row.project, budget)
            for run_id, held in known.held.items():
                others = others if run_id == row.run.id else others.plus(held.call.amount)
        limits = limits_of(row, budget, run_nanos, known.now if known else None)
        if why := refusal(limits, call, row.run.model, self._house.settings.currency, others):
            return why
        if known is not None:
            known.held[row.run.id] = _Held(call, row.spent)
        return None

    async def _project(self, project: str, budget: Budget) -> _Known:
        day = today(self._house)
        known = self._known.get(project)
        if known is not None and known.is_fresh(day, budget):
            return known
        before = known.spent.before if known is not None and known.spent.day == day else None
        if known is not None:
            known.since = NOTHING  # what ends while the rows are read may count twice, and never not at all
        read_at = time.monotonic()

        async def look(tx: Transaction) -> ProjectSpent:
            return await project_spent(tx, self._house, project, budget, before)

        spent = await self._house.store.read(look)
        took_s = time.monotonic() - read_at
        known = self._known.setdefault(project, _Known(spent, read_at, took_s))
        known.spent, known.read_at, known.took_s = spent, read_at, took_s
        return known

    def release(self, row: RunRow) -> None:
        """The run's call is over: what it has taken counts instead of what was expected. row: as it is now."""
        known = self._known.get(row.project)
        if known is None or (held := known.held.pop(row.run.id, None)) is None:
            return
        taken = _less(row.spent, held.spent)
        nanos = cost_of(held.call.price, taken).nanos or 0
        known.since = known.since.plus(Amount(taken.prompt_tokens + taken.completion_tokens, nanos))


def _less(more: Usage, less: Usage) -> Usage:
    cached = more.prompt_token_details.cached_tokens - less.prompt_token_details.cached_tokens
    return Usage(
        prompt_tokens=more.prompt_tokens - less.prompt_tokens,
        completion_tokens=more.completion_tokens - less.completion_tokens,
        prompt_token_details=PromptTokenDetails(cached),
    )


def today(house: House) -> int:
    return int(house.clock.now()) // DAY_S


def _is_of_project(budget: Budget) -> bool:
    return budget.day_tokens is not None or budget.day_cost is not None or _is_total(budget)


def _is_total(budget: Budget) -> bool:
    return budget.total_tokens is not None or budget.total_cost is not None


async def run_cost(tx: Transaction, house: House, row: RunRow) -> int:
    return await get_run_cost(tx, row.project, row.run.id, house.settings.currency)


async def project_spent(
    tx: Transaction, house: House, project: str, budget: Budget, before: Amount | None = None
) -> ProjectSpent:
    """before: what was spent up to today, where that is known."""
    day, currency = today(house), house.settings.currency
    if before is None and _is_total(budget):
        before = await sum_spend(tx, project, currency, before_day=day)
    return ProjectSpent(day, await sum_spend(tx, project, currency, from_day=day), before)


def limits_of(row: RunRow, budget: Budget, run_nanos: int, spent: ProjectSpent | None) -> list[Limit]:
    """The limits that hold for a run, with what is spent of each. spent: needed where the project has a budget."""
    asked: RunAsked = row.asked
    run_tokens = row.spent.prompt_tokens + row.spent.completion_tokens
    limits = [_tokens("this run", most, run_tokens) for most in (asked.max_total_tokens, budget.run_tokens)]
    limits += [_money("this run", most, run_nanos) for most in (asked.max_cost, budget.run_cost)]
    if spent is not None:
        total = spent.today.plus(spent.before or NOTHING)
        limits += [
            _tokens("this project for today (UTC)", budget.day_tokens, spent.today.tokens),
            _money("this project for today (UTC)", budget.day_cost, spent.today.nanos),
            _tokens("this project", budget.total_tokens, total.tokens),
            _money("this project", budget.total_cost, total.nanos),
        ]
    return [limit for limit in limits if limit is not None]


async def read_limits(tx: Transaction, house: House, row: RunRow, budget: Budget) -> list[Limit]:
    """As `limits_of`, with what is spent read from the rows."""
    spent = await project_spent(tx, house, row.project, budget) if _is_of_project(budget) else None
    return limits_of(row, budget, await run_cost(tx, house, row), spent)


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
        wanted = call.amount if limit.of == "this run" else call.amount.plus(others)
        more = wanted.nanos if limit.money else wanted.tokens
        if limit.spent + more > limit.most:
            return _words(limit, more, currency, alone=wanted == call.amount)
    return None


def _words(limit: Limit, more: int, currency: str, *, alone: bool) -> str:
    def said(amount: int) -> str:
        return f"{money_text(amount)} {currency}" if limit.money else f"{amount} tokens"

    what = "the prompt of the next call of the model takes"
    if not alone:
        what = "the calls that are at work and the prompt of the next one take"
    return (
        f"The budget of {limit.of} would be passed: it is {said(limit.most)}, {said(limit.spent)} are spent, and {what}"
        f" about {said(more)} more."
    )
