"""How the offline model uses the file search tool: what it asks of the files, and what it reads in the answer.

Pure rules for `offline.py`; nothing is searched here. Of what a search gives, only what stands between the fences is
quoted; it is text to quote from, whatever it says.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from afterglow.offline_values import STOP, clipped, sentences_of, stems_of, topic_of, words_of

DESCRIBED = "Search the files attached"  # how the tool's description begins, whatever its name
QUERY_CHARS = 400
QUOTED_CHARS = 300
STATEMENT_CHARS = 500  # what is longer is no sentence: a list, a table, a piece of code
LEAST_WORDS = 4  # of a sentence that is quoted: less is a heading, or a crumb of a table

# Words that ask for what files say, also where a function fits.
OF_DOCUMENTS = re.compile(
    r"\b(?:according to|documents?|documentation|docs|files?|handbook|manual|guide|guidelines|polic(?:y|ies)|contract"
    r"|pdf|paper|article|attach(?:ed|ments?))\b",
    re.I,
)
PASSAGE = re.compile(
    r"^(?P<marker>【\d+:\d+†[^【】\n]*】) from [^\n]*:\n<(?P<fence>quote-[0-9a-f]+)>\n(?P<text>.*?)\n</(?P=fence)>$",
    re.M | re.S,
)
# Lines of a document that only name or order what it says, or that would cite for us.
NO_STATEMENT = re.compile(r"#|[-*|\d. ]*\[[^\]]*\]\([^)]*\)$|[|: -]+$|.*【\d+:\d+†", re.S)
CODE_BLOCK = re.compile(r"^```.*?(?:^```[ \t]*$|\Z)", re.M | re.S)
BULLET = re.compile(r"^(?:[-*•] |\d{1,3}[.)] )\s*")


class Statement(NamedTuple):
    """A sentence of a file, and the marker of the passage that it stands in."""

    text: str
    marker: str


def queries_for(question: str) -> list[str]:
    """The words that tell what a question is about, and the question itself."""
    words = re.findall(r"\w+(?:[.'’-]\w+)*", topic_of(question))
    telling = " ".join(dict.fromkeys(word for word in words if word.lower() not in STOP))
    whole = " ".join(question.split())
    return list(dict.fromkeys(query[:QUERY_CHARS] for query in (telling, whole) if query))


def statements_of(outputs: list[str]) -> list[Statement]:
    """What the passages of searches state, in the searches' order; what two passages share comes once."""
    found: dict[str, Statement] = {}
    for output in outputs:
        for passage in PASSAGE.finditer(output):
            for sentence in sentences_of(CODE_BLOCK.sub("\n", passage["text"])):
                text = BULLET.sub("", sentence)
                if _is_statement(text):
                    found.setdefault(text, Statement(text, passage["marker"]))
    return list(found.values())


def _is_statement(text: str) -> bool:
    return len(text) <= STATEMENT_CHARS and len(words_of(text)) >= LEAST_WORDS and not NO_STATEMENT.match(text)


def rarity(texts: list[str]) -> dict[str, float]:
    """How much each stem tells these texts apart: 1 for one that stands in a single text, less for the others."""
    often = Counter(stem for text in texts for stem in set(stems_of(text)))
    return {stem: count**-0.5 for stem, count in often.items()}


def cited(statements: list[Statement]) -> str:
    """Statements as quotes, each with its marker."""
    return " ".join(f'"{clipped(statement.text, QUOTED_CHARS)}" {statement.marker}' for statement in statements)
