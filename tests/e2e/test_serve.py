"""`afterglow serve` as a process, and the commands that work beside it."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.e2e.processes import PATIENCE_S, Ended, Served, afterglow, environment, serving
from tests.e2e.talking_model import TalkingModel
from tests.scripted_server import ScriptedServer, refusal, reply, says

pytestmark = pytest.mark.slow

STOP_S = 3  # a server with open streams must not wait for those who follow them
SECRET_TEXT = "the treasure lies under the pear tree"
SECRET_KEY = "sk-never-to-be-shown-0123456789"


@asynccontextmanager
async def client(served: Served, key: str = "any") -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(base_url=served.url, api_key=key, max_retries=0, timeout=PATIENCE_S) as made:
        yield made


async def answer(api: openai.AsyncOpenAI, text: str, model: str = "gpt-4o", **fields: Any) -> str:
    """What an assistant says to this text."""
    assistant = fields.pop("assistant_id", None) or (await api.beta.assistants.create(model=model)).id
    thread = await api.beta.threads.create(messages=[{"role": "user", "content": text}])
    run = await api.beta.threads.runs.create_and_poll(thread_id=thread.id, assistant_id=assistant, **fields)
    assert run.status == "completed", run.last_error
    newest = (await api.beta.threads.messages.list(thread.id, limit=1)).data[0]
    return "".join(part.text.value for part in newest.content if part.type == "text")


async def refused(folder: Path, *flags: Any) -> str:
    """Why `afterglow serve` would not start."""
    ended = await afterglow("serve", "--data", folder / "data", *flags)
    assert ended.code == 1
    assert ended.out == ""
    assert "Traceback" not in ended.err
    return ended.err


# --- starting and stopping -------------------------------------------------------------------------------------


async def test_the_greeting(tmp_path: Path):
    """At the start it says where it listens, where the data lies, what answers, and how to stop it."""
    async with serving(tmp_path) as served:
        assert served.greeting == {
            "Base URL": served.url,
            "Data": str(tmp_path / "data"),
            "Model": "the built-in offline model, which is no language model (--model-url URL names a real one)",
            "Stop": "Ctrl-C",
        }
        async with client(served) as api:
            assert "built-in offline stand-in" in await answer(api, "Why is the sky blue?")
        assert served.complaints == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_stopping_with_an_open_stream(number: int, tmp_path: Path):
    """SIGINT, and SIGTERM after `drain_s`, end it with status 0, though a client follows a run that goes on."""
    env = environment(AFTERGLOW_DRAIN_S="0.2")
    async with (
        TalkingModel() as model,
        serving(tmp_path, "--model-url", model.url, env=env) as served,
        client(served) as api,
    ):
        assistant = await api.beta.assistants.create(model="talker")
        thread = await api.beta.threads.create(messages=[{"role": "user", "content": "Think hard."}])
        events = await api.beta.threads.runs.create(thread.id, assistant_id=assistant.id, stream=True)
        async for event in events:
            if event.event == "thread.message.delta":
                break
        ended = await served.stop(number, within_s=STOP_S)
        await events.close()
        assert ended.code == 0
        assert ended.out == "Stopped. Everything acknowledged is stored; runs in progress go on at the next start.\n"
        assert ended.err == ""


async def test_sigterm_lets_runs_end(tmp_path: Path):
    """A run that is being executed ends as if nothing were, and so does its stream; then the server stops by itself."""
    async with TalkingModel() as model, serving(tmp_path, "--model-url", model.url) as served, client(served) as api:
        assistant = await api.beta.assistants.create(model="talker")
        thread = await api.beta.threads.create(messages=[{"role": "user", "content": "Count."}])
        events = await api.beta.threads.runs.create(thread.id, assistant_id=assistant.id, stream=True)
        names = [(await anext(aiter(events))).event]
        served.process.send_signal(signal.SIGTERM)
        names += [event.event async for event in events]
        assert names[-1] == "thread.run.completed"
        assert await asyncio.wait_for(served.process.wait(), STOP_S) == 0


async def test_a_second_server_on_the_same_folder(tmp_path: Path):
    """Two servers on one data folder are refused; the first is not disturbed."""
    async with serving(tmp_path) as served:
        said = await refused(tmp_path, "--port", 0)
        assert said == f"afterglow: Another Afterglow is already serving the data folder {tmp_path / 'data'}.\n"
        async with client(served) as api:
            await api.beta.threads.create()


async def test_a_port_in_use(tmp_path: Path):
    """A port that is taken is named."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = await refused(tmp_path, "--port", port)
        assert said == f"afterglow: Cannot listen on 127.0.0.1, port {port}: Address already in use.\n"


async def test_what_is_no_http(tmp_path: Path):
    """Bytes that cannot be read as HTTP get the API's error form, and the server goes on."""
    async with serving(tmp_path) as served:
        url = httpx2.URL(served.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(b"GET \x00 nonsense\r\n\r\n")
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 400 ")
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        async with client(served) as asking:
            assert (await asking.models.list()).data


async def test_beyond_loopback_only_with_keys(tmp_path: Path):
    """Another address than loopback is refused with the command that makes a key; that command is the way out."""
    flags = ("--host", "0.0.0.0")
    said = await refused(tmp_path, *flags, "--port", 0)
    command = next(line for line in said.splitlines() if line.startswith("    afterglow "))
    key = (await afterglow(*command.split()[1:])).out.strip()
    async with serving(tmp_path, *flags) as served, client(served, key) as api:
        await api.beta.threads.create()
        with pytest.raises(openai.AuthenticationError):
            await api.with_options(api_key="any").beta.threads.create()


async def test_its_own_address_as_upstream(tmp_path: Path):
    """A model server that is this very server is refused: every call would call itself."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0"):
        said = await refused(tmp_path, "--port", port, "--model-url", f"http://{host}:{port}/v1")
        assert "is this server's own address. Name the one behind it." in said


# --- settings --------------------------------------------------------------------------------------------------


async def test_names_of_models(tmp_path: Path):
    """Flags, variables and the file decide which model is asked for; the object keeps the name the app gave."""
    config = tmp_path / "afterglow.toml"
    async with ScriptedServer() as model:
        model.on("GET /v1/models", reply({"data": [{"id": "listed", "max_model_len": 8192}]}))
        config.write_text(f'model_url = "{model.url}"\naliases = {{ "gpt-4o" = "file" }}\ndefault_model = "default"\n')
        model.says(*(says("Yes.") for _ in range(3)))
        variables = environment(AFTERGLOW_ALIASES="gpt-4o=variable", AFTERGLOW_CONFIG="ignored")
        async with (
            serving(tmp_path, "--config", config, "--alias", "gpt-4=flag", env=variables) as served,
            client(served) as api,
        ):
            for name in ("gpt-4", "gpt-4o", "listed"):
                assert await answer(api, "Hello", model=name) == "Yes."
        asked = [request.json["model"] for request in model.chats]
        # The flag stands for all aliases, so that of the variable is not known and the default answers.
        assert asked == ["flag", "default", "listed"]


async def test_variables(tmp_path: Path):
    """Every setting has a variable: here the model server, its key, and our own keys."""
    async with ScriptedServer() as model:
        model.says(says("Yes."))
        variables = {
            "MODEL_URL": model.url,
            "MODEL_KEY": "sk-upstream",
            "ALIASES": "gpt-4o=a",
            "API_KEYS": "sk-ours:blue",
        }
        env = environment(**{f"AFTERGLOW_{name}": value for name, value in variables.items()})
        async with serving(tmp_path, env=env) as served, client(served, "sk-ours") as api:
            assert served.greeting["Model"] == model.url
            assert await answer(api, "Hello") == "Yes."
            with pytest.raises(openai.AuthenticationError):
                await api.with_options(api_key="sk-other").beta.threads.create()
        assert model.chats[0].headers["authorization"] == "Bearer sk-upstream"


async def test_the_variables_of_openai_are_not_ours(tmp_path: Path):
    """OPENAI_API_KEY and OPENAI_BASE_URL point apps at us: they are never used to call a model."""
    async with ScriptedServer() as bystander, ScriptedServer() as model:
        env = environment(OPENAI_API_KEY=SECRET_KEY, OPENAI_BASE_URL=bystander.url)
        async with serving(tmp_path, env=env) as served, client(served) as api:
            assert "built-in offline stand-in" in await answer(api, "Why is the sky blue?")
        model.says(says("Yes."))
        async with serving(tmp_path, "--model-url", model.url, env=env) as served, client(served) as api:
            assert await answer(api, "Hello") == "Yes."
        assert bystander.requests == []
        assert all(SECRET_KEY not in str(request.headers) for request in model.requests)


async def test_a_root_path(tmp_path: Path):
    """Behind a proxy the base URL has the proxy's path, whether the proxy takes it off or not."""
    async with serving(tmp_path, "--root-path", "/llm/") as served:
        assert served.url.endswith("/llm/v1")
        async with client(served) as api:
            thread = await api.beta.threads.create()
            inner = api.with_options(base_url=served.url.replace("/llm", ""))
            assert (await inner.beta.threads.retrieve(thread.id)).id == thread.id


async def test_declared_assistants(tmp_path: Path):
    """An assistant of the file is there from the start, under its fixed id, with what the file says."""
    (tmp_path / "tutor.md").write_text("Always answer 'Think for yourself.'\n")
    file = tmp_path / "assistants.toml"
    file.write_text('[assistants.asst_tutor]\nmodel = "gpt-4o"\ninstructions_file = "tutor.md"\n')
    async with serving(tmp_path, "--assistants", file) as served, client(served) as api:
        found = await api.beta.assistants.retrieve("asst_tutor")
        assert (found.model, found.instructions) == ("gpt-4o", "Always answer 'Think for yourself.'")
        assert await answer(api, "What is 2 + 2?", assistant_id="asst_tutor") == "Think for yourself."
    file.write_text("[assistants.asst_tutor]\nmodel = 4\n")
    said = await refused(tmp_path, "--port", 0, "--assistants", file)
    assert f"{file}: [assistants.asst_tutor]: Invalid type for 'model'" in said


# --- what is written down --------------------------------------------------------------------------------------


async def test_the_log_as_json(tmp_path: Path):
    """Each line of the JSON log is an object, and none holds a key or a message's text, not even at level debug."""
    flags = ("--log-format", "json", "--log-level", "debug")
    async with ScriptedServer() as model:
        model.says(says(SECRET_TEXT), refusal(400, "no such parameter"), reply(b"<html>", 500))
        env = environment(
            AFTERGLOW_API_KEYS=SECRET_KEY, AFTERGLOW_MODEL_KEY=f"{SECRET_KEY}-up", AFTERGLOW_MODEL_RETRIES="0"
        )
        async with serving(tmp_path, "--model-url", model.url, *flags, env=env) as served:
            async with client(served, SECRET_KEY) as api:
                assert await answer(api, SECRET_TEXT) == SECRET_TEXT
                for _ in range(2):
                    with pytest.raises(AssertionError):
                        await answer(api, SECRET_TEXT)
                with pytest.raises(openai.BadRequestError):
                    await api.beta.threads.create(extra_body={SECRET_TEXT: SECRET_TEXT})
                with pytest.raises(openai.AuthenticationError):
                    await api.with_options(api_key=f"{SECRET_KEY}-not").beta.threads.create()
            ended = await served.stop()
    lines = [json.loads(line) for line in ended.err.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert any(line["level"] == "warning" for line in lines)
    for secret in (SECRET_TEXT, SECRET_KEY):
        assert secret not in ended.err
    stored = [file.read_bytes() for file in (tmp_path / "data").rglob("*") if file.is_file()]
    assert all(SECRET_KEY.encode() not in data for data in stored)


# --- beside a running server -----------------------------------------------------------------------------------


async def beside(tmp_path: Path, *words: Any) -> Ended:
    ended = await afterglow(*words, "--data", tmp_path / "data")
    assert ended.code == 0, ended.err
    return ended


async def test_keys_beside_a_server(tmp_path: Path):
    """A key made beside a running server is good at once, and what it sees is its project's; revoked, it is dead."""
    async with serving(tmp_path) as served:
        made = [await beside(tmp_path, "keys", "create", "--project", project) for project in ("blue", "red")]
        blue, red = (ended.out.strip() for ended in made)
        async with client(served, blue) as api:
            thread = await api.beta.threads.create()
            with pytest.raises(openai.NotFoundError):
                await api.with_options(api_key=red).beta.threads.retrieve(thread.id)
            await beside(tmp_path, "keys", "revoke", made[0].err.split()[2])
            await until_dead(api)


async def until_dead(api: openai.AsyncOpenAI) -> None:
    """Wait until the client's key is refused."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await api.beta.threads.create()
            except openai.AuthenticationError:
                return
            await asyncio.sleep(0.05)


async def test_import_and_export_beside_a_server(tmp_path: Path):
    """What is exported beside one running server is imported beside another, and is the same there."""
    there = tmp_path / "there"
    there.mkdir()
    file = tmp_path / "saved.jsonl"
    async with serving(tmp_path) as served, client(served) as api:
        assert await answer(api, "Hello")
        await beside(tmp_path, "export", file)
        assistants = (await api.beta.assistants.list()).data
        threads = await all_threads(served)
    async with serving(there) as served, client(served) as api:
        tried = await beside(there, "import", file, "--dry-run")
        assert await all_threads(served) == []
        done = await beside(there, "import", file)
        assert done.out
        assert tried.out
        assert (await api.beta.assistants.list()).data == assistants
        assert await all_threads(served) == threads
        messages = (await api.beta.threads.messages.list(threads[0]["id"])).data
        assert [message.role for message in messages] == ["assistant", "user"]


async def all_threads(served: Served) -> list[Any]:
    async with httpx2.AsyncClient(headers={"authorization": "Bearer any"}, verify=False) as plain:
        listed: list[Any] = (await plain.get(f"{served.url}/threads")).json()["data"]
        return listed


# --- doctor ----------------------------------------------------------------------------------------------------


async def examined(folder: Path, model: ScriptedServer, *flags: str) -> Ended:
    return await afterglow("doctor", "--data", folder / "data", "--model-url", model.url, *flags)


async def test_doctor_and_a_good_model_server(tmp_path: Path):
    """A model server that answers is well, and the running server is seen."""
    async with TalkingModel() as model, serving(tmp_path):
        ended = await examined(tmp_path, model, "--default-model", "talker")
        assert ended.code == 0, ended.out
        assert ended.err == ""
        assert "a server is running on it" in ended.out
        assert ended.out.endswith("\nAll is well.\n")


async def test_doctor_and_a_model_that_calls_no_functions(tmp_path: Path):
    """A model that answers in words when it should call a function is found, with advice of its own."""
    async with ScriptedServer() as model:
        model.on("GET /v1/models", reply({"data": [{"id": "talker", "max_model_len": 8192}]}))
        model.says(says("Hello."), says("It is noon."))
        ended = await examined(tmp_path, model)
        assert ended.code == 1
        assert "answered without calling it\n     → Choose a model that was trained to call functions" in ended.out


async def test_doctor_and_a_model_server_that_refuses(tmp_path: Path):
    """A wrong key is found, with advice; the key itself is not shown."""
    async with ScriptedServer() as model:
        for route in ("GET /v1/models", "POST /v1/chat/completions"):
            model.on(route, refusal(401, f"Incorrect API key provided: {SECRET_KEY}"))
        ended = await examined(tmp_path, model, "--model-key", SECRET_KEY)
        assert ended.code == 1
        assert "BAD" in ended.out
        assert (
            "→ Check that the server runs, the URL (it ends in /v1 as a rule), the key and the model's name."
            in ended.out
        )
        assert SECRET_KEY not in ended.out + ended.err


async def test_doctor_and_no_model_server(tmp_path: Path):
    """A model server that is not there is found, with its address."""
    async with ScriptedServer() as model:
        pass
    ended = await examined(tmp_path, model)
    assert ended.code == 1
    assert f"127.0.0.1:{model.port}" in ended.out
    assert "Traceback" not in ended.err
