"""The commands that need no server, in this process."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import sys
from contextlib import closing
from pathlib import Path

import pytest

from afterglow import __version__, cli, doctor
from afterglow.app import open_store
from afterglow.audit import operator
from afterglow.contracts import EngineStatus
from afterglow.objects import WebhookEndpoint, WebhookEvent, WebhookTry
from afterglow.rows.webhooks import EndpointRow, insert_delivery, insert_endpoint
from afterglow.sandbox import apparmor
from afterglow.settings import PREFIX, load
from afterglow.testing import ScriptedEngine
from afterglow.webhooks import new_delivery

UNBOUNDED = "the memory of a session is not fully bounded"


@pytest.fixture(autouse=True)
def no_real_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall itself is tried elsewhere; it takes seconds."""
    use_engine(monkeypatch, EngineStatus("on", "native"))


def use_engine(monkeypatch: pytest.MonkeyPatch, status: EngineStatus) -> ScriptedEngine:
    """Let the commands find this engine."""
    engine = ScriptedEngine()
    engine.status = status
    monkeypatch.setattr(doctor, "build_code_engine", lambda _: engine)
    return engine


@pytest.fixture(autouse=True)
def nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test starts in an empty folder, with no setting in the environment."""
    for name in [*os.environ]:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_version(capsys: pytest.CaptureFixture[str]):
    """`afterglow version` names what matters in a report of a fault."""
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith(f"afterglow {__version__}, Python {sys.version.split()[0]}, SQLite 3.")


@pytest.mark.parametrize(
    "words", [[], ["sevre"], ["serve", "--nope"], ["serve", "--por", "1"], ["keys"], ["import"], ["sandbox"]]
)
def test_wrong_words(words: list[str], capsys: pytest.CaptureFixture[str]):
    """Words that are no command end with status 2 and the usage; flags must be written out."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: afterglow")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["sandbox", "setup", "--config", "none.toml"],
            "The configuration file none.toml cannot be read: No such file",
        ),
        (["sandbox", "check", "--code-interpreter", "no"], "expected auto or native or docker or remote or off, got"),
        (["serve", "--port", "http"], "--port: expected a whole number, got 'http'."),
        (["serve", "--port", "65536"], "port: must be between 0 and 65535."),
        (["serve", "--log-level", "loud"], "log_level: expected debug or info or warning or error, got 'loud'."),
        (["serve", "--alias", "gpt-4o"], "expected OLD=NEW, got 'gpt-4o'."),
        (["serve", "--config", "none.toml"], "The configuration file none.toml cannot be read: No such file"),
        (["doctor", "--config", "none.toml"], "The configuration file none.toml cannot be read: No such file"),
        (["keys", "list", "--config", "none.toml"], "The configuration file none.toml cannot be read: No such file"),
    ],
)
def test_wrong_settings(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    """A wrong setting ends with status 1 and one sentence that names it; nothing is made."""
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("afterglow: ")
    assert said in err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 8000 8001", "is no TOML: Expected newline or end of document"),
        ("prot = 8000", "unknown setting 'prot'."),
        ("port = true", "port in wrong.toml: expected a whole number, got True."),
        ("passthrough = 'perhaps'", "passthrough in wrong.toml: expected on or off, got 'perhaps'."),
        ("max_body_mb = 0", "max_body_mb: must be more than 0."),
        ("[upstreams.gpu]\nkey_env = 'X'", "[upstreams.gpu] takes url"),
        ("[upstreams.gpu]\nurl = 'http://gpu/v1'\nkey_env = 'NO_SUCH'", "the variable NO_SUCH named by key_env is not"),
        ("[models.'m']\nwindow = 1", '[models."m"] takes window_tokens'),
    ],
)
def test_wrong_configuration_files(text: str, said: str, capsys: pytest.CaptureFixture[str]):
    """What is wrong in a configuration file is said with its place."""
    Path("wrong.toml").write_text(text)
    assert cli.main(["serve", "--config", "wrong.toml"]) == 1
    assert said in capsys.readouterr().err


def test_keys_are_made_listed_and_revoked(capsys: pytest.CaptureFixture[str]):
    """The secret is printed once, alone on stdout; the list masks it; revoking works once."""
    assert cli.main(["keys", "create", "--project", "blue", "--name", "the shop"]) == 0
    out, err = capsys.readouterr()
    secret = out.strip()
    assert secret.startswith("sk-ag-")
    assert secret not in err
    assert "of project blue" in err
    key_id = err.split()[2]

    assert cli.main(["keys", "list"]) == 0
    listed = capsys.readouterr().out
    assert secret not in listed
    assert listed.split()[0] == key_id
    assert listed.rstrip().endswith("valid  read,write  expires never  used never  the shop")

    assert cli.main(["keys", "revoke", key_id]) == 0
    assert cli.main(["keys", "revoke", key_id]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == (f"{key_id} is revoked.\n", f"afterglow: there is no valid key {key_id}.\n")
    cli.main(["keys", "list"])
    assert "revoked" in capsys.readouterr().out


def audited(columns: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect("afterglow-data/afterglow.db")) as database:
        return database.execute(f"SELECT {columns} FROM audit_log ORDER BY seq").fetchall()


def test_projects_are_made_changed_and_archived(capsys: pytest.CaptureFixture[str]):
    """By id or name; what is said of the settings is checked; and every act is in the audit log, by whom it was."""

    def said(*words: str) -> str:
        assert cli.main(list(words)) == 0
        return capsys.readouterr().out

    project = said("projects", "create", "Blue team", "--limit", "storage_mb=10", "--budget", "day_cost=2.5").strip()
    assert project.startswith("proj_")
    said("keys", "create", "--project", "Blue team", "--scopes", "read", "--expires", "30d")
    assert f"  {project}  " in said("keys", "list")
    said("projects", "set", project, "--name", "Green", "--limit", "storage_mb=none", "--retention", "files_days=3")
    shown = said("projects", "show", "Green")
    assert "limits.storage_mb = none\n" in shown
    assert "retention.files_days = 3\n" in shown
    assert "budget.day_cost = 2.5\n" in shown
    said("projects", "archive", "Green")
    assert "  archived  Green\n" in said("projects", "list")
    for words, why in (
        (["show", "Blue team"], "There is no project 'Blue team'"),
        (["set", "Green", "--limit", "storage=1"], "'storage=1': expected NAME=VALUE"),
        (["set", "Green", "--limit", "storage_mb=-1"], "storage_mb=-1: Expected `int` >= 0.\n"),
        (["set", "Green"], "Nothing to change"),
    ):
        assert cli.main(["projects", *words]) == 1
        assert why in capsys.readouterr().err
    for words, why in (
        (["--expires", "soon"], "expected a number and s, m, h or d"),
        (["--scopes", "read,all"], "There is no scope 'all'"),
        (["--project", "Green"], "is archived"),
    ):
        assert cli.main(["keys", "create", *words]) == 1
        assert why in capsys.readouterr().err
    acts = audited("type, object")
    assert [kind for kind, _ in acts] == ["project.created", "api_key.created", "project.updated", "project.archived"]
    assert {json.loads(act)["actor"]["session"]["user"]["id"] for _, act in acts} == {operator().id}


def test_export_and_import_are_noted(capsys: pytest.CaptureFixture[str]):
    """Both are acts in the audit log of the project they are about, which is there from then on; a dry run is none."""
    Path("in.jsonl").write_text('{"object": "thread", "id": "thread_1", "created_at": 1}\n')
    assert cli.main(["import", "in.jsonl", "--project", "blue", "--dry-run"]) == 0
    assert cli.main(["import", "in.jsonl", "--project", "blue"]) == 0
    assert cli.main(["export", "out.jsonl", "--project", "blue"]) == 0
    assert audited("project_id, type") == [
        ("blue", "project.created"),
        ("blue", "data.imported"),
        ("blue", "data.exported"),
    ]


def test_webhooks_are_listed_and_sent_again(capsys: pytest.CaptureFixture[str]):
    """Endpoints without secrets, deliveries with how they went; a resend makes one pending again."""
    event = WebhookEvent(id="evt_1", created_at=1, type="thread.run.completed", data={"id": "run_1"})
    delivery = new_delivery("whe_1", event, 1_700_000_000)
    delivery.status, delivery.tries = "failed", [WebhookTry(at=1, duration_ms=1, status_code=500, error="It broke.")]
    endpoint = WebhookEndpoint(
        id="whe_1",
        created_at=1,
        updated_at=1,
        name="shop",
        url="https://shop.example/",
        event_types=["*"],
        signing_secret_hint="",
    )

    async def fill() -> None:
        async with open_store(load(environ={})) as store:
            await store.write(lambda tx: insert_endpoint(tx, "blue", EndpointRow(endpoint, "whsec_hidden"), 1))
            await store.write(lambda tx: insert_delivery(tx, "blue", delivery, "thread_1", 1, 1))

    asyncio.run(fill())
    own = ["--project", "blue"]
    assert cli.main(["webhooks", "list", *own]) == 0
    assert capsys.readouterr().out == "whe_1  enabled  https://shop.example/  *  shop\n"
    assert cli.main(["webhooks", "deliveries", "whe_1", "--status", "failed", *own]) == 0
    said = f"{delivery.id}  2023-11-14 22:13:20  failed  thread.run.completed  It broke.\n"
    assert capsys.readouterr().out == said
    assert cli.main(["webhooks", "resend", "whe_1", delivery.id, *own]) == 0
    assert cli.main(["webhooks", "deliveries", "whe_1", "--status", "pending", *own]) == 0
    assert delivery.id in capsys.readouterr().out
    assert audited("project_id, type, resource_id") == [("blue", "webhook_delivery.resent", delivery.id)]
    assert cli.main(["webhooks", "resend", "whe_1", delivery.id]) == 1
    assert capsys.readouterr().err == "afterglow: No webhook endpoint found with id 'whe_1'.\n"


def test_the_secret_of_tool_calls_is_shown_and_replaced(capsys: pytest.CaptureFixture[str]):
    """The secret of a project is made once and shown again; rotating makes another; no two projects share one."""

    def said(*words: str) -> str:
        assert cli.main(["tools", *words]) == 0
        return capsys.readouterr().out.strip()

    first = said("secret", "--project", "blue")
    assert first.startswith("whsec_")
    assert said("secret", "--project", "blue") == first
    assert said("secret") != first
    second = said("rotate", "--project", "blue")
    assert second != first
    assert said("secret", "--project", "blue") == second
    [(project, kind, act)] = audited("project_id, type, object")
    assert (project, kind) == ("blue", "tool_secret.rotated")
    assert second[-8:] not in act


def test_keys_are_stored_hashed(capsys: pytest.CaptureFixture[str]):
    """The secret is in no file of the data folder."""
    cli.main(["keys", "create", "--data", "data"])
    secret = capsys.readouterr().out.strip()
    assert all(secret.encode() not in file.read_bytes() for file in Path("data").rglob("*"))


def test_the_data_folder_is_its_owners_alone(capsys: pytest.CaptureFixture[str]):
    """The data folder has mode 0700 and every file in it 0600, whatever the folder was before."""
    Path("data").mkdir(mode=0o755)
    cli.main(["keys", "create", "--data", "data"])
    capsys.readouterr()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [Path("data"), *Path("data").iterdir()]}
    assert modes.pop("data") == 0o700
    assert set(modes.values()) == {0o600}


def test_doctor_without_a_model_server(capsys: pytest.CaptureFixture[str]):
    """Without a model server all is well, and the offline model is called what it is."""
    assert cli.main(["doctor", "--data", "data"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\nAll is well.\n")
    assert "the built-in offline model answers; it is no language model" in out
    assert "no server is running on it" in out
    assert "BAD" not in out


def test_doctor_on_a_folder_that_cannot_be_used(capsys: pytest.CaptureFixture[str]):
    """A data folder that cannot be used is found, with advice, and the status is 1."""
    Path("file").write_text("in the way")
    assert cli.main(["doctor", "--data", "file/data"]) == 1
    out = capsys.readouterr().out
    assert "BAD  data folder file/data" in out
    assert "Or name another folder with --data." in out
    assert "want mending" in out


def test_doctor_finds_what_serve_would_refuse(capsys: pytest.CaptureFixture[str]):
    """An address beyond loopback without keys, and a model server that is this very server, are found."""
    words = ["doctor", "--data", "data", "--host", "0.0.0.0", "--model-url", "http://127.0.0.1:8000/v1"]
    assert cli.main(words) == 1
    out = capsys.readouterr().out
    assert "afterglow keys create --data data" in out
    assert "is this server's own address" in out


OFF = EngineStatus("off", reason="This kernel refuses user namespaces.", remedy="Ask it nicely.")


@pytest.mark.parametrize(
    ("status", "words", "code", "lines"),
    [
        (EngineStatus("on", "native"), [], 0, ["ok   code interpreter: native", "ok   all limits of its sessions are"]),
        (
            EngineStatus("on", "native", unenforced=(UNBOUNDED,)),
            [],
            0,
            [f" –   not enforced here: {UNBOUNDED}", "     → "],
        ),
        (OFF, [], 1, [" –   This kernel refuses user namespaces.", "     → Ask it nicely."]),
        (
            OFF,
            ["--code-interpreter", "native"],
            1,
            ["BAD  This kernel refuses user namespaces.", "     → Ask it nicely."],
        ),
    ],
)
def test_sandbox_check(
    status: EngineStatus,
    words: list[str],
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """`afterglow sandbox check` says whether code is run and what is not enforced, or why not and what to do; it makes
    no data folder."""
    use_engine(monkeypatch, status)
    assert cli.main(["sandbox", "check", *words]) == code
    out = capsys.readouterr().out
    assert all(line in out for line in lines)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(("engine", "code"), [("auto", 0), ("native", 1), ("docker", 1), ("off", 0)])
def test_doctor_without_a_code_interpreter(
    engine: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """An engine that cannot be had wants mending only when it was asked for by name; the reason is told anyway."""
    use_engine(monkeypatch, OFF)
    assert cli.main(["doctor", "--data", "data", "--code-interpreter", engine]) == code
    assert "This kernel refuses user namespaces.\n     → Ask it nicely.\n" in capsys.readouterr().out


def test_an_engine_that_takes_its_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The doctor does not wait for ever, and takes down what it started."""
    engine = use_engine(monkeypatch, EngineStatus("starting"))
    closed = []

    async def never() -> EngineStatus:
        await asyncio.Event().wait()
        raise AssertionError

    async def close() -> None:
        closed.append(True)

    monkeypatch.setattr(engine, "settled", never)
    monkeypatch.setattr(engine, "close", close)
    monkeypatch.setattr(doctor, "ENGINE_SETTLES_S", 0.01)
    assert cli.main(["sandbox", "check"]) == 1
    assert "the code interpreter is not ready after" in capsys.readouterr().out
    assert closed


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is nothing to set up")
def test_sandbox_setup_with_what_is_no_python(capsys: pytest.CaptureFixture[str]):
    """A --python that is none is refused, and nothing is made."""
    assert cli.main(["sandbox", "setup", "--full", "--python", "no-such", "--sandbox-env", "place/env"]) == 1
    assert capsys.readouterr().err == "afterglow: no-such is no Python program.\n"
    assert list(Path().iterdir()) == []


def test_sandbox_apparmor_where_it_is_not_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """On a kernel without Ubuntu's restriction it changes nothing, and says so."""
    monkeypatch.setattr(apparmor, "RESTRICTION", tmp_path / "not-there")
    assert cli.main(["sandbox", "apparmor"]) == 0
    assert "no profile is needed" in capsys.readouterr().out


def test_import_of_what_is_not_there(capsys: pytest.CaptureFixture[str]):
    """A file that cannot be read is reported and the status is 1."""
    assert cli.main(["import", "nowhere.jsonl", "--data", "data"]) == 1
    assert "nowhere.jsonl: cannot be read" in capsys.readouterr().out


def test_backup_and_restore(capsys: pytest.CaptureFixture[str]):
    """`afterglow backup` copies a data folder, of which `afterglow restore` makes one; keys are in it."""
    assert cli.main(["keys", "create", "--data", "data"]) == 0
    assert cli.main(["backup", "copy", "--data", "data"]) == 0
    assert "copy holds a backup of 1 files" in capsys.readouterr().out
    assert cli.main(["restore", "copy", "--data", "new"]) == 0
    assert "new is ready to be served" in capsys.readouterr().out
    assert cli.main(["keys", "list", "--data", "new"]) == 0
    assert "valid" in capsys.readouterr().out


def test_reindex(capsys: pytest.CaptureFixture[str]):
    """`afterglow reindex` says how many files it has made jobs of, and refuses a store that is not there."""
    assert cli.main(["reindex", "--data", "data"]) == 0
    assert capsys.readouterr().out.startswith("0 files will be indexed anew by the server")
    assert cli.main(["reindex", "vs_x", "--data", "data"]) == 1
    assert capsys.readouterr().err == "afterglow: Vector store with id 'vs_x' not found.\n"


@pytest.mark.parametrize("command", ["backup", "restore"])
def test_backup_of_a_postgres(command: str, capsys: pytest.CaptureFixture[str]):
    """`afterglow backup` and `restore` are for data folders, and say what else there is."""
    assert cli.main([command, "copy", "--database-url", "postgresql://somewhere/x"]) == 1
    assert "pg_dump" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_doctor_and_a_database_that_is_away(capsys: pytest.CaptureFixture[str]):
    """A Postgres or a bucket that does not answer is a finding, without the password."""
    words = ["--database-url", "postgresql://user:geheim@127.0.0.1:1/x"]
    assert cli.main(["doctor", "--code-interpreter", "off", *words]) == 1
    out = capsys.readouterr().out
    assert "BAD  the database of database_url" in out
    assert "geheim" not in out


def test_restore_over_something(capsys: pytest.CaptureFixture[str]):
    """A data folder that holds anything is never restored into."""
    cli.main(["keys", "create", "--data", "data"])
    cli.main(["backup", "copy", "--data", "data"])
    assert cli.main(["restore", "copy", "--data", "data"]) == 1
    assert "afterglow: The folder data is not empty. Name a new one.\n" in capsys.readouterr().err
