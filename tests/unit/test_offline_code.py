"""The offline model with the `python` tool: the code it writes, that code at work on real files, and what it says."""

from __future__ import annotations

import ast
import csv
import json
import os
import subprocess
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import afterglow
from afterglow.offline_tables import NAMING, Column, Figures, plan_code, plan_for
from afterglow.offline_values import words_of
from afterglow.sandbox import packages
from afterglow.settings import load
from afterglow.tools.function import offer
from tests.unit.test_offline import INTEGER, STRING, Turn, ask, called, function, said

PYTHON = offer([{"type": "code_interpreter"}]).tools[0]
TARGETS = function("get_sales_targets", "The sales target of each region", year=INTEGER)
OFF = "ERROR: Code Interpreter is off: no engine. Run `afterglow sandbox setup`."
SALES = Path(afterglow.__file__).parent / "demo_data" / "sales.csv"
LOOKED = "\n".join(
    (
        'size: {"rows": 4, "columns": 3}',
        'column: {"name": "day", "type": "date", "missing": 0, "from": "2025-01-01", "to": "2025-04-02"}',
        'column: {"name": "region", "type": "text", "missing": 1, "distinct": 2, "values": ["North", "South"]}',
        'column: {"name": "revenue", "type": "number", "missing": 0}',
    )
)


def files(*names: str, note: str = "1.2 KB") -> dict[str, Any]:
    """The system message of a run with these files."""
    lines = "".join(f"\n- /mnt/data/{name} ({note})" for name in names)
    return said("system", f"Be brief.\n\nFiles for the python tool:{lines}")


def ran(number: int, output: str, code: str = "") -> list[dict[str, Any]]:
    """A cell run earlier for the same message."""
    return called(f"call_{number}", "python", output, code=code)


def code_of(turn: Turn) -> str:
    [(name, arguments)] = turn.calls
    assert name == "python"
    assert list(arguments) == ["code"]
    return str(arguments["code"])


# --- when it writes code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    [
        "Analyze sales.csv",
        "Please analyse the attached file.",
        "What is the total revenue by region?",
        "Plot revenue over time",
        "How many rows are there?",
        "Describe the data",
        "which region sold most",
    ],
)
async def test_a_question_about_a_table_is_first_a_look_at_it(question):
    """A question that a file can answer makes code that reads that very file."""
    code = code_of(await ask(files("sales.csv"), question, tools=[PYTHON]))
    assert 'path = "/mnt/data/sales.csv"' in code
    assert "pd.read_csv(path" in code
    ast.parse(code)


@pytest.mark.parametrize(
    "question",
    ["Hello!", "Who are you?", "Thanks", "Remember that my number is 555-1234.", "What is the capital of France?"],
)
async def test_other_questions_run_nothing(question):
    """Small talk beside a file is small talk."""
    turn = await ask(files("sales.csv"), question, tools=[PYTHON])
    assert turn.calls == []
    assert turn.text


async def test_a_long_text_is_no_request():
    """The words of a text that comes with the question ask for nothing."""
    text = "The table of rows. We plot charts and analyze files by month.\n" * 40
    turn = await ask(files("sales.csv"), f"What does this say about the weather?\n\n{text}", tools=[PYTHON])
    assert turn.calls == []


async def test_without_a_file_or_the_tool_nothing_runs():
    """No file, or no tool, no code."""
    assert (await ask("Analyze sales.csv", tools=[PYTHON])).calls == []
    assert (await ask(files("sales.csv"), "Analyze sales.csv", tools=[TARGETS], tool_choice="none")).calls == []
    assert (await ask(files("sales.csv"), "Analyze the file")).calls == []


async def test_the_file_that_is_named_is_read():
    """Of several files the question's own is taken, else the first that can be read."""
    listed = files("logo.png", "a.csv", "old data (1).tsv")
    assert '"/mnt/data/old data (1).tsv"' in code_of(await ask(listed, "Analyze old data (1).tsv", tools=[PYTHON]))
    assert '"/mnt/data/a.csv"' in code_of(await ask(listed, "Analyze the data", tools=[PYTHON]))


@pytest.mark.parametrize(
    ("name", "reads"),
    [("a.xlsx", "read_excel(path)"), ("a.json", "read_json(path)"), ("a.JSONL", "lines=True"), ("a.txt", "open(")],
)
async def test_files_are_read_by_their_ending(name, reads):
    """Workbooks, JSON and texts are read as what they are."""
    assert reads in code_of(await ask(files(name), f"Describe {name}", tools=[PYTHON]))


async def test_a_file_that_is_too_large_is_not_touched():
    """What was not put into the sandbox is not read, and the answer says why."""
    turn = await ask(
        files("big.csv", note="1.9 GB, too large to be put there"), "Analyze big.csv", tools=[PYTHON, TARGETS]
    )
    assert turn.calls == []
    assert turn.text == "I cannot look into big.csv (1.9 GB, too large to be put there)."


async def test_the_tool_is_known_by_its_description():
    """A function of the caller's named python is the caller's; ours is found under its other name."""
    own = function("python", "Look up a snake", genus=STRING)
    both = offer([own, {"type": "code_interpreter"}]).tools
    [(name, _)] = (await ask(files("sales.csv"), "Analyze sales.csv", tools=both)).calls
    assert name == "code_interpreter"


async def test_tool_choice_is_heeded():
    """`none` runs nothing; `required` and the tool's name run at least a look at what there is."""
    for choice in ("required", {"type": "function", "function": {"name": "python"}}):
        assert "iterdir" in code_of(await ask("Hi", tools=[PYTHON], tool_choice=choice))
        assert "read_csv" in code_of(await ask(files("a.csv"), "Analyze a.csv", tools=[PYTHON], tool_choice=choice))
    assert (await ask(files("a.csv"), "Analyze a.csv", tools=[PYTHON], tool_choice="none")).calls == []
    named = {"type": "function", "function": {"name": "get_sales_targets"}}
    turn = await ask(files("a.csv"), "Analyze a.csv", tools=[PYTHON, TARGETS], tool_choice=named)
    assert [name for name, _ in turn.calls] == ["get_sales_targets"]


# --- with the caller's functions -------------------------------------------------------------------------------


async def test_functions_come_first_and_their_figures_are_used():
    """A fitting function is called before any code; its numbers by name are set against the table's."""
    question = "Analyze sales.csv for 2025 and compare with the sales targets"
    asked: list[Any] = [files("sales.csv"), question]
    tools = [PYTHON, TARGETS]
    assert (await ask(*asked, tools=tools)).calls == [("get_sales_targets", {"year": 2025})]
    asked += called("call_0", "get_sales_targets", '{"targets": {"north": 90, "SOUTH": 50.5}}', year=2025)
    asked += ran(1, LOOKED, code_of(await ask(*asked, tools=tools)))
    code = code_of(await ask(*asked, tools=tools))
    assert 'against["targets"] = pd.Series({"North": 90, "South": 50.5})' in code
    asked += ran(2, 'against: {"North": {"revenue": 99.0, "targets": 90}}')
    turn = await ask(*asked, tools=tools)
    assert "against targets (of get_sales_targets): North 99 of 90 (110%)" in turn.text
    assert turn.text.count("get_sales_targets") == 1


async def test_figures_are_found_in_lists_of_objects():
    """A function that answers with one object per name is understood, too."""
    rows = [{"region": "North", "target": 90, "currency": "EUR"}, {"region": "South", "target": 50, "currency": "EUR"}]
    made = called("call_0", "get_sales_targets", json.dumps({"rows": rows}), year=2025)
    asked = [files("sales.csv"), "Analyze sales.csv, targets of 2025", *made, *ran(1, LOOKED)]
    assert '{"North": 90, "South": 50}' in code_of(await ask(*asked, tools=[PYTHON, TARGETS]))


async def test_other_outputs_are_told_beside():
    """What a function said that does not fit the table is told after the findings."""
    rate = function("get_exchange_rate", "The exchange rate of a currency", currency=STRING)
    made = called("call_0", "get_exchange_rate", '{"rate": 1.08}', currency="USD")
    asked = [files("sales.csv"), "Analyze sales.csv and get the exchange rate", *made, *ran(1, LOOKED)]
    text = (await ask(*asked, *ran(2, 'revenue by region: {"North": 1}'), tools=[PYTHON, rate])).text
    assert text.index("revenue by region: North 1") < text.index("get_exchange_rate(currency=USD) says: rate 1.08")


async def test_without_an_engine_it_says_so_once_and_goes_on():
    """The reason is told once, beside what the functions gave; no more code is tried."""
    made = called("call_0", "get_sales_targets", '{"targets": {"North": 90, "South": 50}}', year=2025)
    asked = [files("sales.csv"), "Analyze sales.csv for 2025 against the sales targets", *made, *ran(1, OFF)]
    turn = await ask(*asked, tools=[PYTHON, TARGETS])
    assert turn.calls == []
    assert turn.text.startswith("Python could not be run: Code Interpreter is off: no engine. Run `afterglow sandbox")
    assert turn.text.count("is off") == 1
    assert "North 90" in turn.text


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("Traceback (most recent call last):\n  File x\nValueError: no\n", "The Python code failed: ValueError: no."),
        ("Traceback (most recent call last):\n  x\nKeyError\n", "The Python code failed: KeyError."),
        ("\n[The sandbox session ended: out of memory. Its variables are gone.]\n", "ended: out of memory. Its"),
        ("[Interrupted: this took longer than 120 seconds. Variables are kept.]", "Interrupted: this took longer"),
        ("(no output)", "Python could not be run: (no output)."),
    ],
)
async def test_code_that_fails_is_no_secret(output, told):
    """An error, a timeout or a lost session is told in words, whichever cell it struck."""
    first = await ask(files("sales.csv"), "Analyze sales.csv", *ran(1, output), tools=[PYTHON])
    assert told in first.text
    if output.startswith("("):
        return
    second = await ask(files("sales.csv"), "Analyze sales.csv", *ran(1, LOOKED), *ran(2, output), tools=[PYTHON])
    assert told in second.text
    assert "sales.csv has 4 rows and 3 columns" in second.text
    assert "summary.csv" not in second.text


# --- other uses of Python --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Run this code:\n```python\nprint(6 * 7)\n```", "print(6 * 7)"),
        ("What does this print?\n```\nprint('a')\nprint('b')\n```", "print('a')\nprint('b')"),
        ("Please run `print(1)`", "print(1)"),
        ("Execute the following Python code: x = 1\nprint(x)", "x = 1\nprint(x)"),
        ("What is 12 * 7?", "print(12 * 7)"),
        ("calculate 3 plus 4", "print(3 + 4)"),
    ],
)
async def test_code_and_sums_are_run(text, code):
    """Code that the message holds, and a sum that it asks for, are run as they are."""
    assert code_of(await ask(text, tools=[PYTHON])) == code


async def test_code_that_nobody_wants_run_is_left_alone():
    """A question about code is no request to run it."""
    assert (await ask("Explain this:\n```python\nimport os\n```", tools=[PYTHON])).calls == []


async def test_what_code_printed_is_told():
    """The answer shows the output of given code, and the result of a sum."""
    shown = await ask("Run this code:\n```python\nprint(6 * 7)\n```", *ran(1, "42\n"), tools=[PYTHON])
    assert shown.text == "The code gave:\n\n```\n42\n```"
    for output, result in (
        ("84\n", "84"),
        ("[A new sandbox session: empty.]\n84\n", "84"),
        ("0.30000000000000004", "0.3"),
    ):
        assert (await ask("What is 12 * 7?", *ran(1, output), tools=[PYTHON])).text == f"12 * 7 = {result}"
    turn = await ask("What is 12 * 7?", *ran(1, OFF), tools=[PYTHON])
    assert "is off" in turn.text
    assert turn.text.endswith("Worked out without it: 12 * 7 = 84")


# --- nothing breaks it -----------------------------------------------------------------------------------------

LINES = st.sampled_from(
    [
        *LOOKED.split("\n"),
        'size: {"rows": "x"}',
        'column: {"name": 3}',
        'against: {"North": 1}',
        "saved: {}",
        "[image: x]",
    ]
)
# "Order ID" is no measure, nor is "Unnamed: 0": what the numbers of such columns add up to is not asked.
NAMES = st.text(min_size=1, max_size=12).filter(
    lambda name: NAMING.isdisjoint(words_of(name)) and not name.startswith("Unnamed")
)


@settings(max_examples=60, deadline=None)
@given(first=st.lists(LINES | st.text(max_size=40)), second=st.lists(LINES | st.text(max_size=40)))
async def test_no_output_breaks_it(first, second):
    """Whatever a cell printed, there is a next cell or an answer."""
    asked = [files("sales.csv"), "Analyze sales.csv", *ran(1, "\n".join(first))]
    turn = await ask(*asked, tools=[PYTHON])
    assert turn.calls or turn.text
    assert (await ask(*asked, *ran(2, "\n".join(second)), tools=[PYTHON])).text


@settings(max_examples=100, deadline=None)
@given(
    names=st.lists(NAMES, min_size=4, max_size=4, unique=True),
    values=st.lists(NAMES, min_size=2, max_size=4, unique=True),
    label=NAMES,
)
def test_any_names_make_code(names, values, label):
    """Columns and values of any name make code that Python reads, with the names in it as they are."""
    day, value, group, other = names
    columns = [
        Column(day, "date", first="2024-01-01", last="2025-01-01"),
        Column(value, "number"),
        Column(group, "text", distinct=len(values), values=tuple(values)),
        Column(other, "text", distinct=2, values=("A", "B")),
    ]
    given_figures = Figures(label, "f", dict.fromkeys(values, 1.0))
    plan = plan_for("analyze", columns, [given_figures])
    assert plan
    texts = {node.value for node in ast.walk(ast.parse(plan_code(plan))) if isinstance(node, ast.Constant)}
    assert {day, value, group} <= texts


# --- the code at work ------------------------------------------------------------------------------------------

NOTEBOOK = """
import contextlib, io, json, sys, traceback
import matplotlib
matplotlib.use("agg")
import matplotlib.pyplot as plt
for line in sys.stdin:
    code = json.loads(line)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            if code:
                exec(code, cells)
            else:
                cells = {}
        except Exception:
            traceback.print_exc()
    pictures = "".join(f"[image: file-{number}]\\n" for number in plt.get_fignums())
    plt.close("all")
    print(json.dumps(output.getvalue() + pictures), flush=True)
"""


class Notebook:
    """Runs cells in the interpreter's environment, without any wall: the code is our own. /mnt/data is `folder`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.folder = folder
        self.codes: list[str] = []
        self._process = process
        self.run("")

    def run(self, code: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(code.replace("/mnt/data", str(self.folder))) + "\n")
        self._process.stdin.flush()
        return str(json.loads(self._process.stdout.readline()))

    async def answer(self, question: str, *names: str, tools: Any = (), earlier: Any = ()) -> str:
        """The model's answer to a question about files of the folder, after all of its cells."""
        asked = [files(*names), question, *earlier]
        while (turn := await ask(*asked, tools=[PYTHON, *tools])).calls:
            self.codes.append(code_of(turn))
            asked += ran(len(self.codes), self.run(self.codes[-1]), self.codes[-1])
        return turn.text


@pytest.fixture(scope="module")
def interpreter() -> Iterator[subprocess.Popen[str]]:
    found = packages.describe(packages.environment(load({})))
    if not found.usable:
        if os.environ.get("CI"):
            pytest.fail("The interpreter's environment is not there: afterglow sandbox setup")
        pytest.skip("the interpreter's environment is not there: afterglow sandbox setup")
    command = [found.python, "-W", "error", "-c", NOTEBOOK]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def notebook(interpreter: subprocess.Popen[str], tmp_path: Path) -> Notebook:
    return Notebook(interpreter, tmp_path)


def sums(rows: list[dict[str, str]], group: str, value: str) -> dict[str, float]:
    totals: dict[str, float] = defaultdict(float)
    for row in rows:
        if row[group] and row[value]:
            totals[row[group]] += float(row[value])
    return dict(totals)


async def test_the_sales_are_analysed(notebook):
    """On the demo's table: true figures, a chart, a file, and the targets of the caller's function beside them."""
    (notebook.folder / "sales.csv").write_bytes(SALES.read_bytes())
    with SALES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    by_region = sums(rows, "region", "revenue")
    targets = called("call_t", "get_sales_targets", '{"targets": {"North": 73500, "West": 43050}}', year=2025)
    text = await notebook.answer(
        "Analyze sales.csv against the sales targets of 2025", "sales.csv", tools=[TARGETS], earlier=targets
    )
    missing = {name: sum(not row[name] for row in rows) for name in ("region", "units", "revenue")}
    assert f"sales.csv has {len(rows)} rows and 6 columns" in text
    assert "missing: " + " and ".join(f"{n} in {name}" for name, n in missing.items()).replace(" and ", ", ", 1) in text
    assert f"revenue: {sum(float(row['revenue'] or 0) for row in rows):,.2f} in total" in text
    for region, total in by_region.items():
        assert f"{region} {total:,.2f} (" in text
    assert f"North {by_region['North']:,.2f} of 73,500 ({by_region['North'] / 73500:.0%})" in text
    assert "[summary.csv](sandbox:/mnt/data/summary.csv)" in text
    assert "The chart shows revenue by region and revenue by month." in text
    with (notebook.folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        saved = {row["region"]: float(row["revenue"]) for row in csv.DictReader(file)}
    assert saved == pytest.approx(by_region)


async def test_a_narrow_question_gets_a_narrow_answer(notebook):
    """Which … most: the answer first, without a chart or a file."""
    (notebook.folder / "sales.csv").write_bytes(SALES.read_bytes())
    text = await notebook.answer("Which product sold the most units?", "sales.csv")
    assert text.startswith("- Beeswax candle is highest in units by product, with ")
    assert len(notebook.codes) == 2
    assert "plt" not in "".join(notebook.codes)
    assert not (notebook.folder / "summary.csv").exists()


async def test_rows_are_chosen_by_the_values_that_are_named(notebook):
    """A value in the question restricts the rows, and the answer says so."""
    (notebook.folder / "a.csv").write_text("team,city,points\nRed,Oslo,1\nBlue,Oslo,2\nRed,Rome,4\nBlue,Rome,8\n")
    text = await notebook.answer("What is the total of points by city for team Red?", "a.csv")
    assert "counted are only rows where team is Red" in text
    assert "points: 5 in total" in text


async def test_how_many_rows_needs_one_look(notebook):
    """The size of a table is known after the first cell."""
    (notebook.folder / "a.csv").write_text("a,b\n1,2\n3,4\n5,6\n")
    assert await notebook.answer("How many rows are in a.csv?", "a.csv") == "a.csv has 3 rows and 2 columns (a, b)."
    assert len(notebook.codes) == 1


GERMAN = "Datum;Größe;Preis €\n31.01.2024;klein;1.5\n05.02.2024;groß;3,5\n07.02.2024;groß;5,0\n".replace("1.5", "1,5")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("de.csv", GERMAN, ["from 2024-01-31 to 2024-02-07", "Preis €: 10 in total", "groß 8.50 (85%)"]),
        ("us.csv", "when,amount ($)\n1/31/2024,1\n2/5/2024,2\n", ["from 2024-01-31 to 2024-02-05", "2024-02 2"]),
        ("no date.csv", "name,points\nA,1\nB,2\nA,3\n", ["points by name: A 4 (67%), B 2 (33%)"]),
        ("numbers.csv", "x,y\n0.5,0.001\n0.7,0.002\n", ["y: 0.003 in total", "The chart shows y."]),
        ("one.csv", "value\n1\n2\n", ["value: 3 in total"]),
        ("groups.csv", "team,state\nRed,open\nBlue,open\nRed,shut\n", ["rows by team: Red 2 (67%), Blue 1 (33%)"]),
        ("日本.csv", "地域,売上\nA,1\nB,2\nB,3\n", ["売上 by 地域: B 5 (83%), A 1 (17%)"]),
        ("tab.tsv", "k\tv\na\t1\nb\t2\na\t2\n", ["v by k: a 3 (60%), b 2 (40%)"]),
        ("quotes.csv", 'a "q",b $x$\nx,1\ny,2\n', ['b $x$ by a "q": y 2 (67%), x 1 (33%)']),
        ("same.csv", "a b,a-b,v\nx,p,1\ny,q,2\n", ["v by a b: y 2", "v by a-b: q 2"]),
        ("price.csv", "city,price\nOslo,2\nRome,4\nOslo,4\n", ["average price by city: Rome 4, Oslo 3"]),
        ("data.json", '[{"k": "a", "v": 1, "l": [1]}, {"k": "b", "v": 2, "l": []}]', ["v by k: b 2 (67%), a 1 (33%)"]),
        ("data.jsonl", '{"k": "a", "v": 1}\n{"k": "b", "v": 2}\n', ["v: 3 in total"]),
        (
            "texts.csv",
            "\n".join(["comment", *(f"words {n}" for n in range(40))]),
            ["has 40 rows and 1 column (comment)."],
        ),
        ("header.csv", "a,b\n", ["header.csv has 0 rows and 2 columns (a, b)."]),
        ("empty.csv", "", ["The Python code failed: ", "EmptyDataError: No columns to parse from file."]),
        ("broken.json", "{", ["The Python code failed: "]),
        ("notes.txt", "Hello there.\nA note.", ['notes.txt has 2 lines, 4 words and 20 characters. It begins: "Hello']),
    ],
)
async def test_tables_of_many_shapes(notebook, name, text, told):
    """Nothing about a table is built in: separators, dates, names and kinds are found at work."""
    (notebook.folder / name).write_text(text, "utf-8")
    answer = await notebook.answer(f"Analyze {name}", name)
    for each in told:
        assert each in answer
    for code in notebook.codes:
        assert max(map(len, code.splitlines())) <= 120 or "isin" in code


async def test_workbooks_are_read(notebook):
    """An xlsx file is a table, with dates and column names that are numbers."""
    made = notebook.run(
        textwrap.dedent("""
            import pandas as pd
            days = pd.to_datetime(["2024-01-01", "2024-02-01"])
            pd.DataFrame({2023: [1, 2], "k": ["a", "b"], "day": days}).to_excel("/mnt/data/book.xlsx", index=False)
        """)
    )
    assert made == ""
    text = await notebook.answer("Describe book.xlsx", "book.xlsx")
    assert "book.xlsx has 2 rows and 3 columns (2023, k, day), from 2024-01-01 to 2024-02-01." in text
    assert "2023 by k: b 2 (67%), a 1 (33%)" in text
