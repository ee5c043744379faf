"""A stand-in for the Docker Engine, in this process, on a unix socket: the endpoints that we use, as its API
reference has them. A container can be a child process that runs the guest of a session, unwalled, in a folder of its
own; so cells really run, and nothing is proved of any wall.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import secrets
import signal
import sys
import tarfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import afterglow.sandbox
from afterglow.sandbox.guest.frames import pack

Guest = Literal["real", "ready", "silent"]
SANDBOX = Path(afterglow.sandbox.__file__).parent
GUEST = "import sys; sys.path.insert(0, sys.argv[1]); from guest import contained; contained.main(sys.argv[2])"
READY = pack({"t": "ready", "id": 1})
STDOUT, STDERR = 1, 2
PIECE_BYTES = 32_768


@dataclass(eq=False)
class Container:
    """body: as it was created with. client: who is attached. guest: see `FakeDocker`, once it was started."""

    id: str
    name: str
    body: dict[str, Any]
    folder: Path
    client: asyncio.StreamWriter | None = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    guest: Guest | None = None
    out_of_memory: bool = False
    process: asyncio.subprocess.Process | None = None

    def say(self, data: bytes, stream: int = STDOUT) -> None:
        """Send what the container wrote, packed."""
        assert self.client is not None
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self.client.write(bytes([stream, 0, 0, 0]) + len(piece).to_bytes(4) + piece)

    def hear(self, data: bytes) -> None:
        if self.guest == "ready":
            self.say(READY)
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.write(data)

    def hang_up(self) -> None:
        """The client is gone, and with it stdin."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    async def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(self.process.pid, signal.SIGKILL)
            await self.process.wait()


class FakeDocker:
    """The daemon. What a test sets here before it connects is what the daemon says of itself.

    build_says: lines of a build, as objects; None: it succeeds. refuses: an answer (status, message) to requests whose
    method and path contain the key. guest: what containers run, from their start: `real`, the guest itself; `ready`,
    nothing, but hello is answered; `silent`, nothing. python: what the guest is run by; without packages it is there
    sooner.
    """

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "docker.sock")
        self.folder = folder
        self.version = {"ApiVersion": "1.47", "MinAPIVersion": "1.24", "Os": "linux", "Version": "27.3.1"}
        self.info: dict[str, Any] = {
            "NCPU": 8,
            "MemoryLimit": True,
            "SwapLimit": True,
            "PidsLimit": True,
            "CpuCfsQuota": True,
            "Runtimes": {"io.containerd.runc.v2": {"path": "runc"}, "runc": {"path": "runc"}},
        }
        self.images: set[str] = set()
        self.builds: list[dict[str, bytes]] = []
        self.build_says: list[dict[str, Any]] | None = None
        self.refuses: dict[str, tuple[int, str]] = {}
        self.guest: Guest = "ready"
        self.python = [sys.executable, "-S"]
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.containers: dict[str, Container] = {}
        self._server: asyncio.AbstractServer | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[FakeDocker]:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        try:
            yield self
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Go away, in the middle of everything; the containers with it."""
        if self._server is not None:
            self._server.close()
        for client in list(self._clients):
            client.transport.abort()
        for container in list(self.containers.values()):
            await self.remove(container)
        if self._tasks:
            await asyncio.wait(self._tasks)
        Path(self.path).unlink(missing_ok=True)

    def add(self, labels: dict[str, str]) -> Container:
        """A container that is there already, and runs nothing."""
        return self._add(secrets.token_hex(4), {"Labels": labels})

    def _add(self, name: str, body: dict[str, Any]) -> Container:
        folder = self.folder / name
        folder.mkdir()
        container = Container(secrets.token_hex(32), name, body, folder)
        self.containers[name] = container
        return container

    # --- HTTP

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._clients.add(writer)
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._clients.discard(writer)
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether another may follow."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
        method, target, _ = head.split(" ", 2)
        length = re.search(r"^content-length: (\d+)", head, re.IGNORECASE | re.MULTILINE)
        body = await reader.readexactly(int(length[1])) if length else b""
        url = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.asked.append(f"{method} {url.path}")
        for part, (status, message) in self.refuses.items():
            if part in self.asked[-1]:
                return self._say(writer, status, {"message": message})
        if url.path == "/version":
            return self._say(writer, 200, self.version)
        version, path = re.match(r"/v([\d.]+)(/.*)", url.path).groups()  # type: ignore[union-attr]
        if [int(number) for number in version.split(".")] > [int(n) for n in self.version["ApiVersion"].split(".")]:
            newest = self.version["ApiVersion"]
            told = f"client version {version} is too new. Maximum supported API version is {newest}"
            return self._say(writer, 400, {"message": told})
        return await self._route(method, unquote(path), query, body, reader, writer)

    async def _route(
        self,
        method: str,
        path: str,
        query: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        match method, path.strip("/").split("/"):
            case "GET", ["info"]:
                return self._say(writer, 200, self.info)
            case "GET", ["images", tag, "json"]:
                if tag in self.images:
                    return self._say(writer, 200, {"Id": "sha256:0", "RepoTags": [tag]})
                return self._say(writer, 404, {"message": f"No such image: {tag}"})
            case "POST", ["build"]:
                return self._build(writer, query["t"], body)
            case "GET", ["containers", "json"]:
                return self._list(writer, json.loads(query["filters"])["label"])
            case "POST", ["containers", "create"]:
                return self._create(writer, query["name"], json.loads(body))
            case verb, ["containers", name, *action]:
                found = self._find(name)
                if found is None:
                    return self._say(writer, 404, {"message": f"No such container: {name}"})
                return await self._of_container(verb, action, query, found, reader, writer)
        return self._say(writer, 404, {"message": "page not found"})

    async def _of_container(
        self,
        method: str,
        action: list[str],
        query: dict[str, str],
        container: Container,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        match method, action:
            case "POST", ["attach"]:
                assert query == {"stream": "1", "stdin": "1", "stdout": "1"}
                await self._attach(container, reader, writer)
                return False
            case "GET", ["json"]:
                state = {"Running": container.guest is not None, "OOMKilled": container.out_of_memory}
                return self._say(writer, 200, {"Id": container.id, "State": state})
            case "POST", ["start"]:
                async with container.lock:
                    await self._start(container)
                return self._say(writer, 204)
            case "POST", ["wait"]:
                assert query == {"condition": "removed"}
                await container.gone.wait()
                return self._say(writer, 200, {"StatusCode": 137})
            case "DELETE", []:
                assert query == {"force": "1", "v": "1"}
                await self.remove(container)
                return self._say(writer, 204)
        return self._say(writer, 404, {"message": "page not found"})

    def _say(self, writer: asyncio.StreamWriter, status: int, body: Any = None) -> bool:
        told = b"" if body is None else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} Said\r\nContent-Type: application/json\r\nContent-Length: {len(told)}\r\n\r\n"
        writer.write(head.encode() + told)
        return True

    # --- images

    def _build(self, writer: asyncio.StreamWriter, tag: str, context: bytes) -> bool:
        with tarfile.open(fileobj=io.BytesIO(context)) as archive:
            files = {entry.name: archive.extractfile(entry) for entry in archive}
            self.builds.append({name: file.read() for name, file in files.items() if file is not None})
        says = self.build_says
        if says is None:
            self.images.add(tag)
            says = [
                {"stream": "Step 1/9 : FROM python\n"},
                {"aux": {"ID": "sha256:0"}},
                {"stream": "Successfully built"},
            ]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
        for line in says:
            told = json.dumps(line).encode() + b"\r\n"
            writer.write(f"{len(told):x}\r\n".encode() + told + b"\r\n")
        writer.write(b"0\r\n\r\n")
        return True

    # --- containers

    def _find(self, name: str) -> Container | None:
        return next((found for found in self.containers.values() if name in (found.id, found.name)), None)

    def _list(self, writer: asyncio.StreamWriter, labels: list[str]) -> bool:
        found = [
            {
                "Id": container.id,
                "Names": [f"/{container.name}"],
                "Labels": container.body["Labels"],
                "State": "running",
            }
            for container in self.containers.values()
            if all(label in container.body["Labels"] for label in labels)
        ]
        return self._say(writer, 200, found)

    def _create(self, writer: asyncio.StreamWriter, name: str, body: dict[str, Any]) -> bool:
        if body["Image"] not in self.images:
            return self._say(writer, 404, {"message": f"No such image: {body['Image']}"})
        self.created.append(body)
        return self._say(writer, 201, {"Id": self._add(name, body).id, "Warnings": []})

    async def _attach(self, container: Container, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.multiplexed-stream\r\n"
            b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
        )
        container.client = writer
        while data := await reader.read(65_536):
            container.hear(data)
        container.hang_up()

    async def _start(self, container: Container) -> None:
        if container.gone.is_set():
            return
        container.guest = self.guest
        if container.guest != "real":
            return
        container.process = await asyncio.create_subprocess_exec(
            *(*self.python, "-I", "-B", "-c", GUEST, str(SANDBOX), str(container.folder)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            env={"HOME": str(container.folder)},
        )
        task = asyncio.create_task(self._live(container, container.process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, container: Container, process: asyncio.subprocess.Process) -> None:
        """Pass on what it writes, until it has ended; then it removes itself, as AutoRemove has it."""
        assert process.stdout is not None
        while data := await process.stdout.read(65_536):
            container.say(data)
        await process.wait()
        await self.remove(container)

    async def remove(self, container: Container) -> None:
        """The end of it, by whatever cause."""
        async with container.lock:
            await container.kill()
            if container.client is not None:
                container.client.close()
            self.containers.pop(container.name, None)
            container.gone.set()
