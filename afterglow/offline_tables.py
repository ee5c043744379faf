"""Tables for the offline model: the pandas code that looks at one, then at what a question asks of it, and the figures
in words.

Pure rules for `offline_code.py`; nothing is run here. All that is known of a table is what the first cell prints:

    look_code ─ printed ─> columns_of ──> Plan.of(question) ──> Plan.code ─ printed ─> told

Lines meant to be read back are `label: {JSON}`. What a cell did not print is not told.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from keyword import iskeyword
from string import Template
from typing import Any, Literal, NamedTuple

import msgspec

from afterglow.objects import Json
from afterglow.offline_values import as_dict, as_list, parsed, stems_of, word_set, words_of

MAX_COLUMNS = 60  # of a table that are looked at one by one
MAX_GROUPS = 30  # distinct values of a column that rows are grouped by
MAX_NAMED = 8  # groups that an answer names one by one
SUMMARY = "summary.csv"


class Figures(NamedTuple):
    """Numbers by name that one of the caller's functions gave: `targets`, {"North": 73500, …}."""

    label: str
    source: str
    values: dict[str, float]


def find_figures(source: str, output: Any, label: str = "", depth: int = 0) -> Iterator[Figures]:
    """Numbers by name in a function's output: an object of numbers, or a list of objects with a name and a number."""
    own = {str(key): float(each) for key, each in as_dict(output).items() if is_number(each)}
    if len(own) > 1:
        yield Figures(label or source, source, own)
    for key, each in as_dict(output).items() if depth < 4 else ():
        yield from find_figures(source, each, key, depth + 1)
    rows = [row for row in as_list(output) if isinstance(row, dict)]
    first = rows[0] if rows else {}
    for key in (key for key, each in first.items() if is_number(each)):
        for name in (name for name, each in first.items() if isinstance(each, str)):
            values = {str(row.get(name)): float(row[key]) for row in rows if is_number(row.get(key))}
            yield Figures(key, source, values)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def quoted(value: Any) -> str:
    """A text, or a list or dict of texts and numbers, as Python writes it."""
    return json.dumps(value, ensure_ascii=False)


def read_back(output: str) -> dict[str, Json]:
    """The printed lines of the form `label: {JSON}`, by label."""
    parted = (line.partition(": {") for line in output.split("\n"))
    made = {label: parsed(f"{{{rest}") for label, brace, rest in parted if brace}
    return {label: each for label, each in made.items() if isinstance(each, dict)}


def numbers_of(made: dict[str, Json], label: str) -> dict[str, float]:
    """The numbers that stand under a label."""
    return {name: each for name, each in made.get(label, {}).items() if is_number(each)}


# --- looking ---------------------------------------------------------------------------------------------------

READ_TEXT = """\
with open(path, encoding="utf-8", errors="replace") as file:
    head = file.read(65536)
separator = max(",;\\t|", key=head.partition("\\n")[0].count)
decimal = "," if separator != "," and re.search(r"\\d,\\d", head) else "."
table = pd.read_csv(path, sep=separator, decimal=decimal, encoding_errors="replace")"""
READERS = {
    "csv": READ_TEXT,
    "tsv": READ_TEXT,
    "xlsx": "table = pd.read_excel(path)",
    "json": "table = pd.read_json(path)",
    "jsonl": "table = pd.read_json(path, lines=True)",
}
LOOK = Template("""\
import json$imports

import pandas as pd

path = $path
$read
table.columns = [str(name) for name in table.columns]

# Text that looks like dates becomes dates.
date = r"\\d{4}-\\d\\d?(?:-\\d\\d?)?(?:[T ].*)?$$|\\d\\d?[./]\\d\\d?[./]\\d{2,4}$$"
for name in table.select_dtypes(exclude=["number", "bool", "datetime"]):
    text = table[name].dropna().astype(str)
    if text.str.match(date).mean() > 0.9:
        start = text.str.extract(r"^(\\d\\d?)([./])")
        day_first = bool((pd.to_numeric(start[0]) > 12).any() or (start[1] == ".").any())
        dates = pd.to_datetime(table[name], format="mixed", dayfirst=day_first, utc=True, errors="coerce")
        table[name] = dates.dt.tz_localize(None)

print("size:", json.dumps({"rows": len(table), "columns": len(table.columns)}))
kinds = {"i": "number", "u": "number", "f": "number", "M": "date", "b": "yes or no"}
for name in table.columns[:$max_columns]:
    column = table[name]
    about = {"type": kinds.get(column.dtype.kind, "text"), "missing": int(column.isna().sum())}
    if about["type"] == "date":
        about["from"], about["to"] = str(column.min())[:10], str(column.max())[:10]
    if about["type"] == "text":
        values = column.dropna().astype(str)
        about["distinct"] = values.nunique()
        if about["distinct"] <= $max_groups:
            about["values"] = sorted(values.unique())
    print("column:", json.dumps({"name": name, **about}, ensure_ascii=False))

numbers = table.select_dtypes("number")
if len(numbers.columns):
    print(numbers.describe().round(2).to_string())
""")


def look_code(path: str) -> str:
    """The first cell for the table in `path`, whose ending is one of READERS."""
    read = READERS[path.rpartition(".")[2].lower()]
    imports = "\nimport re" if read is READ_TEXT else ""
    return LOOK.substitute(
        imports=imports, path=quoted(path), read=read, max_columns=MAX_COLUMNS, max_groups=MAX_GROUPS
    )


class Column(msgspec.Struct, frozen=True):
    """A column as the first cell printed it. values: of text, when they are few; first, last: of dates."""

    name: str
    type: Literal["number", "date", "yes or no", "text"]
    missing: int = 0
    distinct: int = 0
    values: tuple[str, ...] = ()
    first: str = msgspec.field(name="from", default="")
    last: str = msgspec.field(name="to", default="")

    @property
    def groups(self) -> bool:
        """Whether rows can be grouped by it."""
        return len(self.values) > 1

    @property
    def dated(self) -> bool:
        """Whether it holds dates."""
        return all(re.fullmatch(r"\d{4}-\d\d-\d\d", end) for end in (self.first, self.last))


def columns_of(looked: str) -> list[Column]:
    """The columns as the first cell printed them."""
    columns = []
    for line in looked.split("\n"):
        if line.startswith("column: "):
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                columns.append(msgspec.json.decode(line.removeprefix("column: "), type=Column))
    return columns


# --- deciding --------------------------------------------------------------------------------------------------

# Which number is of interest when the question names none: the first row that a column's name shares a word with.
VALUE_NAMES = tuple(
    map(
        word_set,
        ("revenue turnover sales", "amount total sum", "profit income earnings", "value price cost", "units quantity"),
    )
)
# Numbers that name things, and numbers of which a sum says nothing.
NAMING = word_set("id code zip postcode number nr no phone year month day week index key lat lon latitude longitude")
AVERAGED = word_set(
    "price rate score rating age temperature percent percentage pct ratio share average mean height weight humidity "
    "pressure speed grade"
)
AVERAGE = re.compile(r"\b(?:averages?|means?|typical\w*)\b", re.I)
COUNTING = re.compile(r"\bhow many|\bcount\b|\bnumber of\b", re.I)
SIZE_ONLY = re.compile(r"\b(?:how many|number of|count(?: the)?|which|what) (?:rows|columns)\b", re.I)
# A question that wants the whole picture: every grouping, a chart, a file.
WHOLE = re.compile(
    r"\b(?:analy[sz]\w*|overview|explore|describe|report|plot\w*|charts?|graphs?|diagrams?|draw|summar\w+|trends?"
    r"|compare\w*|develop\w*|statistics|insights?|look (?:at|into))\b",
    re.I,
)
OVER_TIME = re.compile(r"\b(?:trends?|over time|develop\w*|dai?ly|month\w*|year\w*|(?:per|by|each|every) day)\b", re.I)
GRAINS = (("%Y", "year"), ("%Y-%m", "month"), ("%Y-%m-%d", "day"))


@dataclass(frozen=True, slots=True)
class Plan:
    """What the second cell does.

    value: the number of interest, "" to count rows; groups: the columns that rows are grouped by, at most two; date:
    the column of dates, "" when time is of no interest; grain: format and name of its steps; kept: the values to which
    rows are restricted, by column; figures: the caller's, for the first group; whole: with a file and a chart.
    """

    value: str
    average: bool
    groups: list[str]
    date: str
    grain: tuple[str, str]
    kept: dict[str, list[str]] = field(default_factory=dict)
    figures: Figures | None = None
    whole: bool = True

    @property
    def rows(self) -> str:
        """The variable that holds the rows that count."""
        return "rows" if self.kept else "table"

    def by(self, group: str) -> str:
        """What is measured, by `group`: `average price by region`."""
        measured = f"{'average ' if self.average else ''}{self.value}" if self.value else "rows"
        return _one_line(f"{measured} by {group}")


def plan_for(question: str, columns: list[Column], figures: list[Figures]) -> Plan | None:
    """What to do with these columns for this question; None when there is nothing to do.

    figures: those of the caller's functions; the first that name two values of a column are set against sums by it.
    """
    whole = WHOLE.search(question) is not None
    if SIZE_ONLY.search(question) and not whole:
        return None
    value = _value(question, columns)
    average = bool(value and (AVERAGE.search(question) or not AVERAGED.isdisjoint(words_of(value))))
    groups = _groups(question, columns, whole)
    given = None if average else next(_matches(figures, columns), None)
    if given:
        groups = [given[0], *(name for name in groups if name != given[0])][:2]
    dated = next((column for column in columns if column.dated), None)
    if dated and not (whole or OVER_TIME.search(question)) and (value or groups):
        dated = None
    if not (value or groups or dated):
        return None
    date, grain = (dated.name, _grain(question, dated)) if dated else ("", GRAINS[1])
    return Plan(value, average, groups, date, grain, _kept(question, columns), given and given[1], whole)


def _named(question: str, name: str) -> float:
    """How much of a column's name the question says, from 0 to 1."""
    stems = set(stems_of(name))
    return len(stems.intersection(stems_of(question))) / max(1, len(stems))


def _value(question: str, columns: list[Column]) -> str:
    numbers = [column.name for column in columns if column.type == "number"]
    named = max(numbers, key=lambda name: _named(question, name), default="")
    if named and _named(question, named) >= 0.5:
        return named
    if COUNTING.search(question):
        return ""
    measures = [name for name in numbers if NAMING.isdisjoint(words_of(name)) and not name.startswith("Unnamed")]
    known = (name for row in VALUE_NAMES for name in measures if not row.isdisjoint(words_of(name)))
    return next(known, measures[-1] if measures else "")


def _groups(question: str, columns: list[Column], whole: bool) -> list[str]:
    """The columns that the question names; else, for the whole picture, the two of the fewest values."""
    groups = [column for column in columns if column.groups]
    named = [column for column in groups if _named(question, column.name) >= 0.5]
    if not named and whole:
        named = sorted(groups, key=lambda column: column.distinct)
    return [column.name for column in named[:2]]


def _matches(figures: list[Figures], columns: list[Column]) -> Iterator[tuple[str, Figures]]:
    """The figures that name values of a column, with the column; their names as the column spells them."""
    for each in figures:
        for column in columns:
            spelled = {value.casefold(): value for value in column.values}
            values = {
                spelled[name.casefold()]: number for name, number in each.values.items() if name.casefold() in spelled
            }
            if len(values) > 1:
                yield column.name, each._replace(values=values)


def _grain(question: str, dated: Column) -> tuple[str, str]:
    for grain in GRAINS:
        if re.search(rf"\b(?:by|per|each|every) {grain[1]}\b|\b{grain[1]}ly\b", question, re.I):
            return grain
    if dated.first[:7] == dated.last[:7]:
        return GRAINS[2]
    return GRAINS[0] if int(dated.last[:4]) - int(dated.first[:4]) > 3 else GRAINS[1]


def _kept(question: str, columns: list[Column]) -> dict[str, list[str]]:
    """The values that the question names, as the table spells them."""
    named = {column.name: [value for value in column.values if _says(question, value)] for column in columns}
    return {name: values for name, values in named.items() if values}


def _says(question: str, value: str) -> bool:
    spelled = value[:1].isupper() and len(value) > 2
    return spelled and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", question) is not None


# --- writing ---------------------------------------------------------------------------------------------------

TOTALS = Template('print($label, $rows[$value].agg(["count", "sum", "mean", "min", "max"]).to_json())')
GROUP = Template("""\
$by = $measured.sort_values(ascending=False)
print($label, $by.to_json(force_ascii=False))""")
TIME = Template("""\
over_time = $measured
print($label, over_time.to_json())""")
AGAINST = Template("""\
# What $source gave:
against = $by.to_frame($actual)
against[$label] = pd.Series($figures)
print("against:", against.to_json(orient="index", force_ascii=False))""")
SAVE = Template("""\
summary = $summary
summary.to_csv($path, float_format="%.10g")
print("saved:", json.dumps({"path": $path, "rows": len(summary)}))""")
DRAW_ONE = Template("""\
figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
$left
plt.show()""")
DRAW_TWO = Template("""\
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
$left
$right
plt.show()""")


def plan_code(plan: Plan) -> str:
    """The second cell."""
    blocks = ["import matplotlib.pyplot as plt"] if plan.whole else []
    blocks.append(_rows_code(plan))
    for group, variable in _variables(plan).items():
        measured = _measured(plan, f"{plan.rows}.groupby({quoted(group)})")
        blocks.append(GROUP.substitute(by=variable, measured=measured, label=_label(plan.by(group))))
    if plan.date:
        step, word = plan.grain
        measured = _measured(plan, f"{plan.rows}.groupby({plan.rows}[{quoted(plan.date)}].dt.strftime({quoted(step)}))")
        blocks.append(TIME.substitute(measured=measured, label=_label(plan.by(word))))
    if plan.figures:
        blocks.append(_against_code(plan, plan.figures))
    if plan.whole:
        path = quoted(f"/mnt/data/{SUMMARY}")
        blocks += [SAVE.substitute(summary=_summary_code(plan), path=path), _chart_code(plan)]
    return "\n\n".join(blocks) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _label(text: str) -> str:
    return quoted(f"{text}:")


def _variable(name: str, otherwise: str) -> str:
    variable = "_".join(re.findall(r"[^\W_]+", name.lower()))
    return variable if variable.isidentifier() and not iskeyword(variable) and len(variable) < 30 else otherwise


def _variables(plan: Plan) -> dict[str, str]:
    """For each group the variable that holds its result: `by_region`."""
    variables = {group: _variable(f"by_{group}", f"by_group_{n}") for n, group in enumerate(plan.groups, 1)}
    if len(set(variables.values())) < len(variables):
        variables[plan.groups[1]] = "by_group_2"
    return variables


def _rows_code(plan: Plan) -> str:
    """Which rows count, and the measures of the value in all of them."""
    conditions = [f"table[{quoted(name)}].isin({quoted(values)})" for name, values in plan.kept.items()]
    if len(conditions) > 1:
        conditions = [f"({condition})" for condition in conditions]
    lines = [f"rows = table[{' & '.join(conditions)}]"] if conditions else []
    if plan.value:
        label = _label(_one_line(plan.value))
        lines.append(TOTALS.substitute(label=label, rows=plan.rows, value=quoted(plan.value)))
    else:
        lines.append(f'print("rows:", json.dumps({{"count": len({plan.rows})}}))')
    return "\n".join(lines)


def _measured(plan: Plan, grouped: str) -> str:
    if not plan.value:
        return f"{grouped}.size()"
    return f"{grouped}[{quoted(plan.value)}].{'mean' if plan.average else 'sum'}()"


def _against_code(plan: Plan, figures: Figures) -> str:
    actual = _one_line(plan.value) or "rows"
    return AGAINST.substitute(
        source=figures.source,
        figures=quoted({name: int(each) if each.is_integer() else each for name, each in figures.values.items()}),
        actual=quoted(actual),
        label=quoted(figures.label if figures.label != actual else "given"),
        by=_variables(plan)[plan.groups[0]],
    )


def _summary_code(plan: Plan) -> str:
    if plan.figures:
        return "against"
    if plan.groups and plan.value:
        return f'{plan.rows}.groupby({quoted(plan.groups[0])})[{quoted(plan.value)}].agg(["count", "sum", "mean"])'
    if plan.groups:
        return f'{_variables(plan)[plan.groups[0]]}.to_frame("rows")'
    if plan.date:
        return f"over_time.to_frame({quoted(plan.value or 'rows')})"
    return f"{plan.rows}[{quoted(plan.value)}].describe()"


def _panels(plan: Plan) -> dict[str, str]:
    """What the chart shows, at most two things: how each is drawn, by its title."""
    bars = {plan.by(group): f"{variable}.head(12).plot.bar" for group, variable in _variables(plan).items()}
    if plan.figures:
        bars[plan.by(plan.groups[0])] = "against.plot.bar"
    if plan.date:
        return dict([*bars.items()][:1]) | {plan.by(plan.grain[1]): "over_time.plot.line"}
    return bars or {_one_line(plan.value): f"{plan.rows}[{quoted(plan.value)}].plot.hist"}


def _chart_code(plan: Plan) -> str:
    drawn = []
    for side, (title, draw) in zip(("left", "right"), _panels(plan).items(), strict=False):
        marked = ', marker="o"' if draw.endswith("line") else ""
        plain = quoted(title.replace("$", r"\$"))  # matplotlib reads what stands between two of them as a formula
        drawn.append(f'{draw}(ax={side}, title={plain}, xlabel="", rot=30{marked})')
    return (DRAW_TWO if len(drawn) > 1 else DRAW_ONE).substitute(left=drawn[0], right=drawn[-1])


# --- telling ---------------------------------------------------------------------------------------------------

LEAST = re.compile(r"\b(?:least|worst|lowest|smallest|fewest|weakest)\b", re.I)
MOST = re.compile(r"\b(?:most|best|highest|biggest|largest|top|strongest)\b", re.I)


def shown(number: float) -> str:
    """A number as people write it: 81,373.40."""
    if number == int(number):
        return f"{int(number):,}"
    return f"{number:,.2f}" if abs(number) >= 1 else f"{number:.3g}"


def listed(parts: list[str], last: str = "and") -> str:
    """One text, another and a third."""
    return f" {last} ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def counted(number: float, noun: str) -> str:
    return f"{shown(number)} {noun}{'' if number == 1 else 's'}"


def size_told(name: str, looked: str) -> str:
    """What the first cell printed; "" when it did not come so far."""
    size, columns = numbers_of(read_back(looked), "size"), columns_of(looked)
    if size.keys() != {"rows", "columns"}:
        return ""
    told = f"{name} has {counted(size['rows'], 'row')} and {counted(size['columns'], 'column')}"
    if columns:
        told += f" ({', '.join(column.name for column in columns[:12])}{', …' if len(columns) > 12 else ''})"
    if dated := next((column for column in columns if column.dated), None):
        told += f", from {dated.first} to {dated.last}"
    missing = [f"{column.missing:,} in {column.name}" for column in columns if column.missing]
    return f"{told}. Values are missing: {listed(missing[:12])}." if missing else f"{told}."


def plan_told(plan: Plan, output: str, question: str) -> str:
    """What the second cell printed, line by line; the whole of it before or after its parts, as the question wants."""
    made = read_back(output)
    kept = [f"counted are only rows where {name} is {listed(values, 'or')}" for name, values in plan.kept.items()]
    measures = list(_measures_told(plan, numbers_of(made, _one_line(plan.value))))
    groups = [_groups_told(plan, group, numbers_of(made, plan.by(group)), question) for group in plan.groups]
    told = [*kept, *(measures if plan.whole else []), *chain(*groups), *([] if plan.whole else measures)]
    if plan.date:
        told += _time_told(plan.by(plan.grain[1]), numbers_of(made, plan.by(plan.grain[1])))
    if plan.figures and "against" in made:
        told += _against_told(plan.figures, made["against"])
    ends = [f"The summary is in [{SUMMARY}](sandbox:/mnt/data/{SUMMARY})."] if "saved" in made else []
    if "[image" in output:
        ends.append(f"The chart shows {listed(list(_panels(plan)))}.")
    return "\n\n".join(filter(None, ("\n".join(f"- {line}" for line in told), " ".join(ends))))


def _measures_told(plan: Plan, measures: dict[str, float]) -> Iterator[str]:
    if {"sum", "mean", "min", "max"} <= measures.keys():
        total, mean, least, most = (shown(measures[name]) for name in ("sum", "mean", "min", "max"))
        in_total = "" if plan.average else f"{total} in total, "
        yield f"{plan.value}: {in_total}{mean} on average, between {least} and {most}"


def _groups_told(plan: Plan, group: str, numbers: dict[str, float], question: str) -> Iterator[str]:
    """The groups, largest first; first of all the one that the question asks for."""
    if not numbers:
        return
    total = 0 if plan.average or min(numbers.values()) < 0 else sum(numbers.values())
    parts = [f"{name} {shown(number)}{f' ({number / total:.0%})' if total else ''}" for name, number in numbers.items()]
    if (MOST.search(question) or LEAST.search(question)) and not plan.whole:
        name, word = (list(numbers)[-1], "lowest") if LEAST.search(question) else (next(iter(numbers)), "highest")
        yield f"{name} is {word} in {plan.by(group)}, with {shown(numbers[name])}"
    more = f" and {len(parts) - MAX_NAMED} more" if len(parts) > MAX_NAMED else ""
    yield f"{plan.by(group)}: {', '.join(parts[:MAX_NAMED])}{more}"


def _time_told(label: str, numbers: dict[str, float]) -> Iterator[str]:
    if len(numbers) > 3:
        least, most = (choose(numbers, key=numbers.__getitem__) for choose in (min, max))
        yield f"{label}: lowest {shown(numbers[least])} in {least}, highest {shown(numbers[most])} in {most}"
    elif numbers:
        yield f"{label}: {', '.join(f'{name} {shown(number)}' for name, number in numbers.items())}"


def _against_told(figures: Figures, made: Json) -> Iterator[str]:
    pairs = {name: list(filter(is_number, as_dict(each).values())) for name, each in made.items()}
    parts = [
        f"{name} {shown(pair[0])} of {shown(pair[1])}{f' ({pair[0] / pair[1]:.0%})' if pair[1] else ''}"
        for name, pair in pairs.items()
        if len(pair) == 2
    ]
    if parts:
        yield f"against {figures.label} (of {figures.source}): {', '.join(parts)}"
