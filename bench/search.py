"""The embedded search index by itself: speed on made-up text, and how well it finds on a public collection.

Speed is measured by a program of its own, so that its memory is its own: `python -m bench.search` with what `Load`
says, figures as JSON on stdout. Text is made of syllables with the frequencies of words in English (Zipf-Mandelbrot),
and questions of two of its commonest words and four others, each asked once.
"""

from __future__ import annotations

import asyncio
import csv
import math
import resource
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from itertools import product
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import httpx2
import msgspec

from afterglow.contracts import Chunk, Weights
from afterglow.search.embedded import EmbeddedIndex
from afterglow.search.ranking import pack_vector
from bench.client import BenchFailure

if TYPE_CHECKING:
    import numpy as np

PROJECT = "default"
VOCABULARY = 40_000
QUESTIONS = 300
RESULTS = 20
LAST_RESULT = 50


class Load(msgspec.Struct, kw_only=True):
    """What is indexed and asked. words: of a chunk; new_words: those of them that the chunk before it has not, as with
    overlap. dimensions: of the vectors, 0 for none."""

    stores: int
    files: int
    chunks: int
    words: int
    new_words: int
    dimensions: int


class Speed(msgspec.Struct, kw_only=True):
    """text_mb: of all files, once, without what overlaps. rss_mb: at the end, beyond that before the first file."""

    text_mb: float
    put_s: float
    put_cpu_s: float
    query_ms: list[float]
    query_cpu_ms: float
    disk_mb: float
    rss_mb: float


# --- speed -----------------------------------------------------------------------------------------------------


async def speed(load: Load) -> Speed:
    """Run the measurement in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.search", msgspec.json.encode(load).decode()), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout
        answer = await process.stdout.read()
        if await process.wait():
            raise BenchFailure("the measurement of the search index failed; see above")
        return msgspec.json.decode(answer, type=Speed)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _measure(load: Load, folder: Path) -> Speed:
    text_mb = put_s = put_cpu_s = 0.0
    before_mb = 0.0
    stores = [f"vs_bench{number:06}" for number in range(load.stores)]
    async with _index(folder) as index:
        for number, (text, chunks, embeddings) in enumerate(_files(load)):
            before_mb = before_mb or _rss_mb()
            began, cpu = perf_counter(), process_time()
            store = stores[number % load.stores]
            await index.put_file(PROJECT, store, f"file-{number}", {"number": number}, chunks, embeddings, text)
            put_s += perf_counter() - began
            put_cpu_s += process_time() - cpu
            text_mb += len(text) / 1e6
        await index.search(PROJECT, stores[:1], "warm up", _vector(load.dimensions, 0), RESULTS)
        query_ms, cpu = [], process_time()
        for number, question in enumerate(_questions()):
            vector = _vector(load.dimensions, number)
            began = perf_counter()
            await index.search(PROJECT, [stores[number % load.stores]], question, vector, RESULTS)
            query_ms.append((perf_counter() - began) * 1000)
        query_cpu_ms = (process_time() - cpu) * 1000 / len(query_ms)
        rss_mb = _rss_mb() - before_mb
    return Speed(
        text_mb=text_mb,
        put_s=put_s,
        put_cpu_s=put_cpu_s,
        query_ms=query_ms,
        query_cpu_ms=query_cpu_ms,
        disk_mb=_disk_mb(folder),
        rss_mb=rss_mb,
    )


@asynccontextmanager
async def _index(folder: Path) -> AsyncIterator[EmbeddedIndex]:
    index = EmbeddedIndex(folder)
    try:
        yield index
    finally:
        await index.close()


def _disk_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*.db")) / 1e6


def _rss_mb() -> float:
    """Now, where that can be told, else the most so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return pages * resource.getpagesize() / 1024**2


def _words() -> list[str]:
    syllables = ["".join(pair) for pair in product("bdfgklmnprstv", "aeiou")]
    spelled = ["".join(parts) for length in (1, 2, 3) for parts in product(syllables, repeat=length)]
    return spelled[:VOCABULARY]


def _files(load: Load) -> Iterator[tuple[str, list[Chunk], list[bytes] | None]]:
    import numpy as np

    chance = np.random.default_rng(1)
    words = np.array(_words(), dtype=object)
    odds = 1 / (np.arange(VOCABULARY) + 2.7)
    per_file = load.chunks // load.files
    for _ in range(load.files):
        count = load.new_words * per_file + load.words - load.new_words
        spoken = chance.choice(words, size=count, p=odds / odds.sum()).tolist()
        vectors = _packed(chance.standard_normal((per_file, load.dimensions))) if load.dimensions else None
        yield *_cut(spoken, load), vectors


def _packed(vectors: np.ndarray[Any, Any]) -> list[bytes]:
    return [vector.tobytes() for vector in (vectors / math.sqrt(vectors.shape[1])).astype("<f2")]


def _cut(spoken: Sequence[str], load: Load) -> tuple[str, list[Chunk]]:
    places = [0]
    for word in spoken:
        places.append(places[-1] + len(word) + 1)
    text = " ".join(spoken)
    chunks = []
    for index, first in enumerate(range(0, len(spoken) - load.words + 1, load.new_words)):
        start, end = places[first], places[first + load.words] - 1
        chunks.append(Chunk(index, text[start:end], start, end, None, load.words))
    return text, chunks


def _questions() -> Iterable[str]:
    import numpy as np

    chance = np.random.default_rng(2)
    words = _words()
    for _ in range(QUESTIONS):
        common = chance.integers(0, 50, size=2).tolist()
        others = np.exp(chance.uniform(math.log(100), math.log(10_000), size=4)).astype(int).tolist()
        yield " ".join(words[rank] for rank in common + others)


def _vector(dimensions: int, seed: int) -> list[float] | None:
    import numpy as np

    return np.random.default_rng(seed).standard_normal(dimensions).tolist() if dimensions else None


# --- quality ---------------------------------------------------------------------------------------------------

Run = dict[str, list[str]]
Judgements = dict[str, dict[str, float]]


class Collection(msgspec.Struct):
    """A test collection in BEIR form. texts: of the documents, by id; questions: those that any document answers."""

    name: str
    texts: dict[str, str]
    questions: dict[str, str]
    judgements: Judgements


class _Document(msgspec.Struct):
    id: str = msgspec.field(name="_id")
    text: str = ""
    title: str | None = None


class Embedder:
    """An OpenAI-compatible `/embeddings`."""

    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url.rstrip("/"), model

    async def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        vectors: list[list[float]] = []
        async with httpx2.AsyncClient(timeout=300) as client:
            for start in range(0, len(texts), 64):
                body = {"model": self._model, "input": list(texts[start : start + 64])}
                answer = await client.post(f"{self._url}/embeddings", json=body)
                if answer.status_code != 200:
                    raise BenchFailure(f"{self._url}/embeddings answered {answer.status_code}: {answer.text[:200]}")
                vectors += [item["embedding"] for item in answer.json()["data"]]
        return vectors


def read_collection(folder: Path) -> Collection:
    """corpus.jsonl, queries.jsonl and qrels/test.tsv of a folder. Raises BenchFailure when it is no such folder."""
    try:
        documents = _read_lines(folder / "corpus.jsonl")
        questions = _read_lines(folder / "queries.jsonl")
        with (folder / "qrels" / "test.tsv").open(newline="") as file:
            rows = [row for row in csv.reader(file, delimiter="\t") if len(row) == 3 and row[0] != "query-id"]
        judgements: Judgements = {}
        for question, document, grade in rows:
            if float(grade) > 0:
                judgements.setdefault(question, {})[document] = float(grade)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise BenchFailure(f"{folder} holds no collection in BEIR form: {error}") from None
    texts = {one.id: f"{one.title or ''}\n{one.text}".strip() for one in documents}
    asked = {one.id: one.text for one in questions if texts.keys() & judgements.get(one.id, {}).keys()}
    return Collection(folder.name, texts, asked, judgements)


def _read_lines(path: Path) -> list[_Document]:
    return msgspec.json.Decoder(_Document).decode_lines(path.read_bytes())


async def retrieve(collection: Collection, folder: Path, embed: Embedder | None) -> dict[str, Run]:
    """What is found for each question, best first, by each way of searching; a document is one chunk."""
    ids = list(collection.texts)
    vectors = await embed(list(collection.texts.values())) if embed else None
    questions = await embed(list(collection.questions.values())) if embed else [None] * len(collection.questions)
    ways = {"lexical": Weights(embedding=0)}
    if embed:
        ways |= {"vector": Weights(text=0), "hybrid": Weights()}
    runs: dict[str, Run] = {way: {} for way in ways}
    async with _index(folder) as index:
        packed = [pack_vector(vector) for vector in vectors] if vectors else None
        await index.put_file(PROJECT, "vs_beir", "file", {}, _as_chunks(collection.texts.values()), packed)
        for (name, question), vector in zip(collection.questions.items(), questions, strict=True):
            for way, weights in ways.items():
                hits = await index.search(PROJECT, ["vs_beir"], question, vector, LAST_RESULT, weights=weights)
                runs[way][name] = [ids[hit.chunk.index] for hit in hits]
    return runs


def _as_chunks(texts: Iterable[str]) -> list[Chunk]:
    chunks: list[Chunk] = []
    at = 0
    for text in texts:
        chunks.append(Chunk(len(chunks), text, at, at + len(text), None, len(text.split())))
        at += len(text) + 1
    return chunks


def plain_bm25(collection: Collection) -> Run | None:
    """What a BM25 library finds with its defaults; None where it is not installed."""
    try:
        import bm25s  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return None
    ids, run = list(collection.texts), {}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(collection.texts.values()), show_progress=False), show_progress=False)
    for name, question in collection.questions.items():
        tokens = bm25s.tokenize([question], show_progress=False)
        found, _ = index.retrieve(tokens, k=min(LAST_RESULT, len(ids)), show_progress=False)
        run[name] = [ids[number] for number in found[0]]
    return run


def ndcg(run: Run, judgements: Judgements, depth: int = 10) -> float:
    """Normalised discounted cumulative gain, mean over the questions."""

    def gain(grades: Iterable[float]) -> float:
        return sum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(list(grades)[:depth]))

    def share(found: list[str], grades: Mapping[str, float]) -> float:
        return gain(grades.get(one, 0) for one in found) / gain(sorted(grades.values(), reverse=True))

    return _mean(run, judgements, share)


def recall(run: Run, judgements: Judgements, depth: int = 20) -> float:
    """The share of the documents that answer a question which are among the first found, mean over the questions."""
    return _mean(run, judgements, lambda found, grades: len(set(found[:depth]) & grades.keys()) / len(grades))


def _mean(run: Run, judgements: Judgements, score: Callable[[list[str], Mapping[str, float]], float]) -> float:
    return sum(score(found, judgements[question]) for question, found in run.items()) / max(len(run), 1)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="afterglow-bench-") as folder:
        measured = asyncio.run(_measure(msgspec.json.decode(sys.argv[1], type=Load), Path(folder)))
    sys.stdout.buffer.write(msgspec.json.encode(measured))


if __name__ == "__main__":
    main()
