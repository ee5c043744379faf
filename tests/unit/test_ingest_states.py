"""What becomes of files of vector stores, and what stores and batches say of it."""

from __future__ import annotations

from typing import get_args

import pytest

from afterglow.ingest.states import FILE_MOVES, FileEvent, batch_status, move_file, store_status
from afterglow.objects import (
    BatchStatus,
    FileCounts,
    FileError,
    FileStatus,
    StaticChunking,
    StaticChunkSizes,
    StoreStatus,
    VectorStoreFile,
)
from afterglow.runs.states import IllegalMove

CHUNKING = StaticChunking(StaticChunkSizes(max_chunk_size_tokens=800, chunk_overlap_tokens=400))


def file_in(status: FileStatus) -> VectorStoreFile:
    return VectorStoreFile(
        id="file-1",
        created_at=1,
        vector_store_id="vs_1",
        status=status,
        chunking_strategy=CHUNKING,
        usage_bytes=5,
        last_error=FileError("server_error", "before"),
    )


def test_the_table_is_whole():
    """Every status has its row, every event happens, every status can be left and come to."""
    assert set(FILE_MOVES) == set(get_args(FileStatus))
    assert {event for moves in FILE_MOVES.values() for event in moves} == set(get_args(FileEvent))
    assert {status for moves in FILE_MOVES.values() for status in moves.values()} == set(FILE_MOVES)
    assert all(moves["attached"] == "in_progress" for moves in FILE_MOVES.values())


@pytest.mark.parametrize("status", get_args(FileStatus))
@pytest.mark.parametrize("event", get_args(FileEvent))
def test_a_file_moves_as_the_table_says(status: FileStatus, event: FileEvent):
    """With it go usage and error; what is not in the table raises, and changes nothing."""
    file, error = file_in(status), FileError("invalid_file", "why")
    if event in FILE_MOVES[status]:
        move_file(file, event, usage_bytes=7, error=error)
        assert (file.status, file.usage_bytes, file.last_error) == (FILE_MOVES[status][event], 7, error)
    else:
        with pytest.raises(IllegalMove):
            move_file(file, event)
        assert file == file_in(status)


def test_a_store_says_what_its_files_say():
    """Expired goes before in_progress, and that before completed; an empty one is completed."""
    assert store_status(FileCounts(), None, 10) == "completed"
    assert store_status(FileCounts(failed=1, total=1), 11, 10) == "completed"
    assert store_status(FileCounts(in_progress=1, completed=1, total=2), 11, 10) == "in_progress"
    assert store_status(FileCounts(in_progress=1, total=1), 10, 10) == "expired"
    assert set(get_args(StoreStatus)) == {"completed", "in_progress", "expired"}


def test_a_batch_says_what_its_files_say():
    """In progress while any is; then cancelled if that was asked, else completed, also when files failed."""
    assert batch_status(FileCounts(in_progress=1, failed=1, total=2), cancelled=True) == "in_progress"
    assert batch_status(FileCounts(completed=1, cancelled=1, total=2), cancelled=True) == "cancelled"
    assert batch_status(FileCounts(completed=1, cancelled=1, total=2), cancelled=False) == "completed"
    assert batch_status(FileCounts(failed=2, total=2), cancelled=False) == "completed"
    assert {"in_progress", "cancelled", "completed"} < set(get_args(BatchStatus))
