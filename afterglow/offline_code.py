"""How the offline model uses the `python` tool: what it has to run for a message, and what it says of the output.

Pure rules for `offline.py`; nothing is run here. Each kind of work writes its next cell from the outputs of the cells
before it, as a person does in a notebook, and at the end says in words what they printed. Tables have a file of their
own, `offline_tables.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from afterglow.offline_tables import (
    READERS,
    Figures,
    Plan,
    columns_of,
    counted,
    listed,
    look_code,
    numbers_of,
    plan_code,
    plan_for,
    plan_told,
    quoted,
    read_back,
    size_told,
)
from afterglow.offline_values import asked_sum, clipped, word_set, work_out

DESCRIBED = "Run Python code in a sandbox"  # how the tool's description begins, whatever its name
RESTARTED = re.compile(r"^\[A new sandbox session: [^\n]*\n")  # what the server may say before an output
TEXTS = word_set("txt md log rst html xml py js yaml yml toml ini")


class SandboxFile(NamedTuple):
    """A file that the system message tells of. too_large: it was not put into the sandbox."""

    path: str
    size: str
    too_large: bool

    @property
    def name(self) -> str:
        return self.path.removeprefix("/mnt/data/")

    @property
    def suffix(self) -> str:
        return self.path.rpartition(".")[2].lower()


class Work(Protocol):
    """What Python is used for. outputs: what the cells so far gave, in their order."""

    def next_code(self, outputs: Sequence[str]) -> str | None:
        """The next cell, or None when there is no more to run."""
        ...

    def findings(self, outputs: Sequence[str]) -> str:
        """What the outputs say, in words; "" when there is nothing to say."""
        ...

    def used(self, outputs: Sequence[str]) -> str:
        """The function whose figures are in the findings, or ""."""
        return ""


# --- what to do ------------------------------------------------------------------------------------------------

FILE_LIST = re.compile(r"^Files for the python tool:\n((?:- /mnt/data/.*(?:\n|\Z))+)", re.M)
FILE_LINE = re.compile(r"^- (/mnt/data/.+) \(([^()]*)\)$", re.M)
# Words that ask for what is in a file, and words that do when no function answers them.
OF_FILES = re.compile(
    r"\b(?:analy[sz]\w*|csv|tsv|excel|spread ?sheets?|tables?|data ?(?:sets?|files?)?|rows?|columns?|files?|attach\w*"
    r"|plots?|charts?|graphs?|diagrams?|histograms?|pandas)\b",
    re.I,
)
OF_FIGURES = re.compile(
    r"\b(?:totals?|sums?|averages?|means?|medians?|max\w*|min\w*|most|least|best|worst|highest|lowest|top|bottom"
    r"|how (?:many|much)|count|trends?|compare\w*|shares?|percent\w*|distribut\w+|develop\w*|statistics"
    r"|(?:by|per) \w+)\b",
    re.I,
)
FENCED = re.compile(r"```(?:python3?|py)?[ \t]*\n(.+?)```", re.I | re.S)
PLAIN_CODE = re.compile(r"\b(?:run|execute|evaluate) (?:this |the |following )*(?:python )?code:\s*(\S.*)", re.I | re.S)
IN_BACKTICKS = re.compile(r"\b(?:run|execute|evaluate) (?:this |the |following |python |code )*:?\s*`([^`\n]+)`", re.I)
RUNNING = re.compile(r"\b(?:run|execute|try|evaluate|prints?|outputs?|results?|returns?)\b", re.I)


def find_files(system: str) -> list[SandboxFile]:
    """The files that the end of the system message lists."""
    lists = FILE_LIST.findall(system)
    lines = FILE_LINE.findall(lists[-1] if lists else "")
    return [SandboxFile(path, size, "too large" in size) for path, size in lines]


def find_work(
    text: str, question: str, files: list[SandboxFile], figures: list[Figures], answered: bool
) -> Work | None:
    """What the newest message needs Python for, if anything.

    question: what of its text is a request; figures: of the caller's functions; answered: one of them fits the message.
    """
    if code := given_code(text):
        return Given(code)
    named = [file for file in files if file.name.casefold() in question.casefold()]
    if not named and not answered and (found := asked_sum(question)):
        return Sum(found) if work_out(found) != "undefined" else None
    if not (named or OF_FILES.search(question) or (OF_FIGURES.search(question) and not answered)):
        return None
    readable = [file for file in named or files if file.suffix in READERS or file.suffix in TEXTS]
    file = next((file for file in readable if not file.too_large), None)
    if file is None:
        return TooLarge(readable[0]) if readable else None
    for each in files:
        question = re.sub(re.escape(each.name), " ", question, flags=re.I)
    return Table(file, question, figures) if file.suffix in READERS else Document(file)


def given_code(text: str) -> str:
    """The code in a message that asks to run it, or ""."""
    fenced = FENCED.search(text)
    if fenced:
        return fenced[1].strip() if RUNNING.search(text[: fenced.start()] + text[fenced.end() :]) else ""
    match = IN_BACKTICKS.search(text) or PLAIN_CODE.search(text)
    return match[1].strip() if match else ""


# --- work of one cell ------------------------------------------------------------------------------------------


BROKEN = re.compile(r"^(?:ERROR: |Traceback \(most recent call|\[Interrupted: |\[The sandbox session ended: )", re.M)
RAISED = re.compile(r"^(?:[A-Za-z_][\w.]*(?:: .*)?|\[(?:Interrupted|The sandbox session ended): .*\])$", re.M)


def failed(output: str) -> bool:
    """Whether the output tells that the code did not come to its end."""
    return BROKEN.search(output) is not None


def failure(output: str) -> str:
    """Why a cell failed: the last line of its traceback or the server's note on its end, else all that was said."""
    raised = [] if output.startswith("ERROR: ") or not failed(output) else RAISED.findall(output)
    if raised:
        return f"The Python code failed: {_ended(clipped(raised[-1].strip('[]'), 300))}"
    return f"Python could not be run: {_ended(clipped(' '.join(output.split()).removeprefix('ERROR: '), 400))}"


def _ended(text: str) -> str:
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


class OneCell(Work, Protocol):
    """Work that one cell does."""

    def code(self) -> str: ...

    def told(self, output: str) -> str:
        """What the output says; "" when it is not what the code prints."""
        ...

    def next_code(self, outputs: Sequence[str]) -> str | None:
        return None if outputs else self.code()

    def findings(self, outputs: Sequence[str]) -> str:
        return (self.told(outputs[0]) or failure(outputs[0])) if outputs else ""


@dataclass(frozen=True)
class Given(OneCell):
    """Code that the message itself holds."""

    source: str

    def code(self) -> str:
        return self.source

    def told(self, output: str) -> str:
        return "" if failed(output) else f"The code gave:\n\n```\n{clipped(output.strip(), 4_000)}\n```"


@dataclass(frozen=True)
class Sum(OneCell):
    """A sum, as Python writes it."""

    sum: str

    def code(self) -> str:
        return f"print({self.sum})"

    def told(self, output: str) -> str:
        printed = output.strip()
        if re.fullmatch(r"-?\d+", printed):
            return f"{self.sum} = {printed}"
        if re.fullmatch(r"-?\d[\d.]*(?:e[+-]?\d+)?", printed):
            return f"{self.sum} = {float(printed):.10g}"
        return f"{failure(output)} Worked out without it: {self.sum} = {work_out(self.sum)}"


DOCUMENT_CODE = """\
import json

with open({path}, encoding="utf-8", errors="replace") as file:
    text = file.read()
size = {{"line": len(text.splitlines()), "word": len(text.split()), "character": len(text)}}
print("size:", json.dumps(size))
print("begins:", json.dumps({{"text": text[:300]}}, ensure_ascii=False))
"""


@dataclass(frozen=True)
class Document(OneCell):
    """A text file: how long it is, and how it begins."""

    file: SandboxFile

    def code(self) -> str:
        return DOCUMENT_CODE.format(path=quoted(self.file.path))

    def told(self, output: str) -> str:
        made = read_back(output)
        size = [counted(number, unit) for unit, number in numbers_of(made, "size").items()]
        begins = " ".join(str(made.get("begins", {}).get("text", "")).split())
        begun = f' It begins: "{clipped(begins, 200)}"' if begins else ""
        return f"{self.file.name} has {listed(size)}.{begun}" if size else ""


LISTING_CODE = """\
import json
from pathlib import Path

files = {path.name: path.stat().st_size for path in sorted(Path("/mnt/data").iterdir())}
print("files:", json.dumps(files, ensure_ascii=False))
"""


@dataclass(frozen=True)
class Listing(OneCell):
    """Nothing in particular, when Python must be used: what files there are."""

    def code(self) -> str:
        return LISTING_CODE

    def told(self, output: str) -> str:
        made = read_back(output)
        if "files" not in made:
            return ""
        names = [f"{name} ({counted(size, 'byte')})" for name, size in numbers_of(made, "files").items()]
        return f"In the sandbox there {'is' if len(names) == 1 else 'are'} {listed(names) or 'no files'}."


@dataclass(frozen=True)
class TooLarge(Work):
    """A file that is not in the sandbox."""

    file: SandboxFile

    def next_code(self, outputs: Sequence[str]) -> str | None:
        return None

    def findings(self, outputs: Sequence[str]) -> str:
        return f"I cannot look into {self.file.name} ({self.file.size})."


# --- work of two cells -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table(Work):
    """A table: looked at, then worked with. question: the message without names of files."""

    file: SandboxFile
    question: str
    figures: list[Figures]

    def next_code(self, outputs: Sequence[str]) -> str | None:
        if not outputs:
            return look_code(self.file.path)
        plan = self._plan(outputs[0])
        return plan_code(plan) if plan and len(outputs) == 1 else None

    def findings(self, outputs: Sequence[str]) -> str:
        if not outputs:
            return ""
        told = [size_told(self.file.name, outputs[0])]
        if (plan := self._plan(outputs[0])) and len(outputs) > 1:
            told.insert(1 if plan.whole else 0, plan_told(plan, outputs[1], self.question))
        if failed(outputs[-1]) or not any(told):
            told.append(failure(outputs[-1]))
        return "\n\n".join(filter(None, told))

    def used(self, outputs: Sequence[str]) -> str:
        plan = self._plan(outputs[0]) if len(outputs) > 1 else None
        return plan.figures.source if plan and plan.figures and "against" in read_back(outputs[1]) else ""

    def _plan(self, looked: str) -> Plan | None:
        if failed(looked) or not numbers_of(read_back(looked), "size").get("rows"):
            return None
        return plan_for(self.question, columns_of(looked), self.figures)
