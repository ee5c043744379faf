"""The bytes of files in an object store, by obstore: S3 and what speaks like it, Google Cloud Storage, Azure.

A small blob is one request. A larger one goes up in parts, a few at a time, and is there when the last has arrived;
when it breaks off, the store is told to drop its parts. A process that is killed tells it nothing: the bucket should
have a rule that deletes unfinished uploads after some days.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError, UnknownConfigurationKeyError
from obstore.store import AzureStore, GCSStore, S3Store

from afterglow.errors import BlobMissing, ConfigError, StoreError, StoreFull, StoreUnavailable
from afterglow.store.blobs import gathered

STORES: Mapping[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
PART_BYTES = 8 * 1024 * 1024  # S3 takes 10,000 parts of at least 5 MB; Cloudflare's R2 wants all of one size
PARTS_AT_ONCE = 2  # one upload holds about four parts in memory
PIECE_BYTES = 4 * 1024 * 1024
DELETES_AT_ONCE = 8
CLIENT = {"connect_timeout": "5s", "timeout": "60s"}  # of one request: a part or a piece
RETRIES: Any = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=30),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5), "base": 2},
}
ENDPOINT = re.compile(r"((aws|google|azure|azure_storage)_)?(endpoint|endpoint_url|endpoint_url_s3|base_url)", re.I)
SECRET = re.compile(r"key|secret|token|sas|password|certificate|header", re.I)
NO_CREDENTIALS = re.compile(r"169\.254\.169\.254|169\.254\.170\.|metadata\.google\.internal|MissingAccessKey")
NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist", re.I)
FULL = re.compile(r"StorageFull|QuotaExceeded|507 Insufficient")
NEEDED = (
    "The bucket must exist, and blob_options (or this process's role or environment) must give credentials that may"
    " read, write, list and delete what is in it."
)


class ObjectBlobs:
    """A `contracts.Blobs` over a bucket of an object store."""

    def __init__(self, url: str, options: Mapping[str, str]) -> None:
        """url: `s3://BUCKET/PREFIX`, `gs://…` or `az://CONTAINER/…`. options: those of obstore's stores and clients.

        What is not in `options` is taken from where the store's own programs look for it: the environment, or the role
        of the machine. Connections without TLS are made to an endpoint that says `http://`. Raises ConfigError.
        """
        parts = urlsplit(url)
        if parts.scheme not in STORES or not parts.netloc:
            raise ConfigError(f"blob_url: expected s3://BUCKET/PREFIX, gs://… or az://…, got {url!r}.")
        self._url = url.rstrip("/")
        self._secrets = [value for name, value in options.items() if SECRET.search(name) and len(value) > 3]
        config = {**CLIENT, **options}
        if any(ENDPOINT.fullmatch(name) and value.startswith("http://") for name, value in options.items()):
            config.setdefault("allow_http", "true")
        prefix = parts.path.strip("/") or None
        try:
            self._store = STORES[parts.scheme](parts.netloc, prefix=prefix, config=config, retry_config=RETRIES)
        except UnknownConfigurationKeyError:
            raise ConfigError(f"blob_options: {self._unknown(parts.scheme, options)}.") from None
        except BaseError as error:
            raise ConfigError(f"blob_options: {self._reason(error)}.") from None

    async def check(self) -> None:
        """Write a blob, read it and delete it. Raises ConfigError, with what to do."""
        key, content = f"ch/check-{secrets.token_hex(8)}", b"May this be written, read and deleted?"
        try:
            await self.put(key, _once(content))
            async with aclosing(self.get(key)) as pieces:
                if b"".join([piece async for piece in pieces]) != content:
                    raise StoreUnavailable(f"{self._url}: what was written is not what is read")
            await self.delete([key])
            with contextlib.suppress(BlobMissing):  # to whom may not list, S3 says that what is missing is forbidden
                await anext(self.get(key))
        except StoreError as error:
            raise ConfigError(f"blob_url: {error}. {NEEDED}") from None

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        async with aclosing(gathered(chunks, PART_BYTES)) as pieces:
            first = await anext(pieces, b"")
            if len(first) >= PART_BYTES:
                return await self._put_in_parts(key, first, pieces)
            with self._translated(key):
                await obstore.put_async(self._store, key, first, use_multipart=False)
            return len(first)

    async def get(self, key: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        # By ranges: a stream would hold its connection for as long as a slow reader takes.
        with self._translated(key):
            size = (await obstore.head_async(self._store, key))["size"]
        end = size if end is None else min(end, size)
        while start < end:
            with self._translated(key):
                piece = await obstore.get_range_async(self._store, key, start=start, end=min(start + PIECE_BYTES, end))
            start += len(piece)
            yield piece.to_bytes()

    async def delete(self, keys: list[str]) -> None:
        # One by one: not everything that speaks like S3 can delete many at once.
        room = asyncio.Semaphore(DELETES_AT_ONCE)

        async def delete(key: str) -> None:
            async with room:
                with contextlib.suppress(BlobMissing), self._translated(key):
                    await obstore.delete_async(self._store, key)

        await asyncio.gather(*(delete(key) for key in keys))

    async def close(self) -> None:
        """Nothing is held open."""

    async def _put_in_parts(self, key: str, first: bytes, rest: AsyncIterator[bytes]) -> int:
        """obstore drops the parts when what it reads from raises: so that is how everything ends that breaks off."""
        line = _Line()
        reading = asyncio.create_task(line.fill(first, rest))
        sending = asyncio.ensure_future(
            obstore.put_async(self._store, key, line, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE)
        )
        try:
            await asyncio.wait([sending])
        finally:
            reading.cancel()
            await asyncio.wait([sending, reading])
            sending.exception()  # looked at, or asyncio would complain that nobody does
        if not reading.cancelled() and (error := reading.exception()):
            raise error
        with self._translated(key):
            await sending
        return reading.result()

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """What the object store says as a StoreError."""
        try:
            yield
        except FileNotFoundError as error:
            if NO_BUCKET.search(str(error)):
                raise StoreUnavailable(f"{self._url}: there is no such bucket") from None
            raise BlobMissing(f"the bytes of {key} are not there") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise StoreUnavailable(f"{self._url}: the credentials were refused: {self._reason(error)}") from None
        except BaseError as error:
            text, reason = str(error), self._reason(error)
            if FULL.search(text):
                raise StoreFull(f"no space left for {key}: {reason}") from None
            if NO_CREDENTIALS.search(text):
                raise StoreUnavailable(f"{self._url}: there are no credentials") from None
            raise StoreUnavailable(f"{self._url}: {key}: {reason}") from None

    def _reason(self, error: BaseError) -> str:
        """Why, without the request, the debugging output and any secret."""
        text = str(error)
        told = [found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>(.*?)</{tag}>", text))]
        reason = ": ".join(told) or text.partition("\n")[0].rpartition(" - ")[2]
        for secret in self._secrets:
            reason = reason.replace(secret, "…")
        return reason.strip().rstrip(".")

    def _unknown(self, scheme: str, options: Mapping[str, str]) -> str:
        """Which of the options there are not; obstore names the first alone."""
        unknown = []
        for name, value in options.items():
            try:
                STORES[scheme]("bucket", config={name: value})
            except UnknownConfigurationKeyError:
                unknown.append(name)
            except BaseError:
                pass  # it is known, and wants others beside it
        names = ", ".join(map(repr, unknown))
        return f"{scheme}:// has no option {names}; its options are those of obstore's {STORES[scheme].__name__}"


class _Line:
    """Pieces on their way from whoever makes them to obstore, one at a time."""

    def __init__(self) -> None:
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(1)
        self._broken = False

    async def fill(self, first: bytes, rest: AsyncIterator[bytes]) -> int:
        """Put in all pieces; return their size. Whatever ends it before the end breaks the line."""
        try:
            await self._pieces.put(first)
            size = len(first)
            async for piece in rest:
                await self._pieces.put(piece)
                size += len(piece)
            await self._pieces.put(None)
        except BaseException:
            self._broken = True
            if self._pieces.empty():
                self._pieces.put_nowait(None)
            raise
        return size

    def __aiter__(self) -> _Line:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._pieces.get()
        if self._broken:
            raise _BrokenOff
        if piece is None:
            raise StopAsyncIteration
        return piece


class _BrokenOff(Exception):
    """Tells obstore to drop what it has sent."""


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content
