"""How a file's text is kept: once, cut where its chunks begin.

A chunk is put together from the piece that begins with it and as many of the next as it reaches into; the first piece
begins with the text, wherever the first chunk does. A chunk's number says where it is from: that of its file, which is
never used again, then its index. Pure, and the same in every index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from afterglow.contracts import Chunk
from afterglow.errors import DimensionMismatch

FILE_BITS = 24


def checked_text(chunks: Sequence[Chunk], embeddings: Sequence[bytes] | None, text: str | None) -> str:
    """The file's text, put together if need be. Raises ValueError when chunks, text and embeddings do not agree."""
    if embeddings is not None and len(embeddings) != len(chunks):
        raise ValueError(f"{len(chunks)} chunks and {len(embeddings)} embeddings")
    whole = _put_together(chunks) if text is None else text
    last = 0
    for index, chunk in enumerate(chunks):
        if chunk.index != index or chunk.start < last or whole[chunk.start : chunk.end] != chunk.text:
            raise ValueError(f"chunk {index} is out of order, or does not stand where it says")
        last = chunk.start
    return whole


def _put_together(chunks: Sequence[Chunk]) -> str:
    parts: list[str] = []
    end = 0
    for chunk in chunks:
        parts.append(" " * (chunk.start - end))
        parts.append(chunk.text[max(end - chunk.start, 0) :])
        end = max(end, chunk.end)
    return "".join(parts)


def cut(chunks: Sequence[Chunk], text: str) -> Iterator[str]:
    """The piece that begins with each chunk; together they are the text."""
    starts = [0, *(chunk.start for chunk in chunks[1:]), len(text)]
    return (text[start:end] for start, end in pairwise(starts)) if chunks else iter(())


def chunks_of(rows: Sequence[tuple[int, int, int, int | None, int]], text: str) -> list[Chunk]:
    """Chunks of one file that follow each other. rows: number, start, end, page and tokens of each; text: their pieces
    and those that they reach into, one after another."""
    if not rows:
        return []
    base = rows[0][1] if _index(rows[0][0]) else 0
    return [
        Chunk(_index(number), text[start - base : end - base], start, end, page, tokens)
        for number, start, end, page, tokens in rows
    ]


def _index(number: int) -> int:
    return number & (1 << FILE_BITS) - 1


def usage_of(text: str, embeddings: Sequence[bytes] | None) -> int:
    """What a file counts for: its text in UTF-8 and its embeddings."""
    return len(text.encode()) + sum(map(len, embeddings or ()))


def checked_dimensions(store_id: str, embeddings: Sequence[bytes] | None, kept: int | None) -> int | None:
    """The floats in each vector of the store, with these in it. kept: before. Raises DimensionMismatch."""
    if not embeddings:
        return kept
    expected = kept or len(embeddings[0]) // 2
    for vector in embeddings:
        if len(vector) != expected * 2:
            raise DimensionMismatch(store_id, expected, len(vector) // 2)
    return expected
