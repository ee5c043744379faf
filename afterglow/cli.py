"""The command `afterglow`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from afterglow import __version__, telemetry
from afterglow.cli_access import add_access_commands, named_project
from afterglow.cli_tools import add_tools_commands
from afterglow.cli_webhooks import add_webhook_commands
from afterglow.commands import add_command as _command
from afterglow.commands import add_data_flags as _data_flags
from afterglow.commands import load_settings as _load
from afterglow.commands import with_store as _with_store
from afterglow.errors import AfterglowError
from afterglow.objects import Json
from afterglow.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0 done, 1 it could not be done, 2 wrong words."""
    options = _parser().parse_args(arguments)
    act: Callable[[argparse.Namespace], int] = options.act
    try:
        status = act(options)
        sys.stdout.flush()
        return status
    except AfterglowError as error:
        print(f"afterglow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read what we print has enough; the interpreter would flush once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="afterglow", description="The Assistants API, self-hosted.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = _command(commands, "serve", _serve, "run the server")
    serve.add_argument(
        "--no-worker", dest="work", action="store_false", help="leave runs to `afterglow worker`; needs a database_url"
    )
    _setting_flags(serve)
    worker = _command(commands, "worker", _worker, "execute runs for servers on the same Postgres")
    _setting_flags(worker)

    demo = _command(commands, "demo", _demo, "start a server and show what it does")
    demo.add_argument("--model-url", help="a model server of yours, instead of the offline model")
    demo.add_argument("--model-key", help="its key")
    demo.add_argument("--model", default="gpt-4o", help="the model to ask for")

    doctor = _command(commands, "doctor", _doctor, "check the data folder and the model server")
    _setting_flags(doctor)

    _command(commands, "version", _version, "print the version")
    add_access_commands(commands)
    add_tools_commands(commands)
    add_webhook_commands(commands)
    _sandbox_commands(commands)

    importing = _command(commands, "import", _import, "take over assistants, threads and messages from files")
    importing.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="JSON or JSONL files, or folders")
    importing.add_argument("--dry-run", action="store_true", help="only report what would be taken, guessed or lost")
    exporting = _command(commands, "export", _export, "write assistants, threads and messages to a file")
    exporting.add_argument("path", type=Path, metavar="PATH", help="a JSONL file")
    backup = _command(commands, "backup", _backup, "copy the data folder, also while it is being served")
    backup.add_argument("path", type=Path, metavar="DIR", help="a new or empty folder")
    restore = _command(commands, "restore", _restore, "make a data folder of a backup")
    restore.add_argument("path", type=Path, metavar="DIR", help="the folder of the backup")
    moving = _command(commands, "migrate", _migrate, "copy a data folder to Postgres and an object store, or back")
    ends = moving.add_mutually_exclusive_group(required=True)
    ends.add_argument(
        "--from", dest="source", metavar="DIR", help="the data folder to copy to the Postgres of the settings"
    )
    ends.add_argument("--to", dest="target", metavar="DIR", help="the new data folder to copy that Postgres to")
    moving.add_argument("--force", action="store_true", help="although processes seem to be at work on the Postgres")
    moving.add_argument("--config", metavar="FILE", help="TOML file with any of the settings")
    reindex = _command(commands, "reindex", _reindex, "have the files of vector stores indexed anew")
    reindex.add_argument("store_id", nargs="?", metavar="VECTOR_STORE_ID", help="one store (default: all of them)")
    for command in (backup, restore, reindex):
        _data_flags(command)
    for command in (importing, exporting):
        command.add_argument("--project", default="default", help="whose they are, by id or name (default: default)")
        _data_flags(command)
    return parser


def _setting_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each row of the settings table that has one."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the settings")
    for row in dataclasses.fields(Settings):
        if not row.metadata["flag"]:
            continue
        if row.name == "aliases":
            parser.add_argument(
                "--alias", dest="aliases", action="append", metavar="OLD=NEW", help=row.metadata["help"]
            )
        else:
            flag = "--" + row.name.replace("_", "-")
            parser.add_argument(flag, metavar=row.name.upper(), help=row.metadata["help"].replace("%", "%%"))


def _sandbox_commands(commands: Any) -> None:
    sandbox = commands.add_parser("sandbox", help="set up and check the code interpreter", allow_abbrev=False)
    actions = sandbox.add_subparsers(dest="action", required=True, metavar="ACTION")
    setup = _command(actions, "setup", _sandbox_setup, "install the Python packages that model-written code may import")
    levels = setup.add_mutually_exclusive_group()
    for level, holds in (("standard", "statistics, machine learning, documents"), ("full", "what else models import")):
        levels.add_argument(f"--{level}", dest="level", action="store_const", const=level, help=f"with {holds}")
    setup.set_defaults(level="base")
    setup.add_argument("--python", metavar="PROGRAM", help="the Python to make the environment of (default: this one)")
    serve = _command(actions, "serve", _sandbox_serve, "give one session to a server elsewhere; a pod's first process")
    serve.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all)")  # noqa: S104
    serve.add_argument("--port", type=int, default=8200, help="port to listen on (default: 8200)")
    check = _command(actions, "check", _sandbox_check, "start the code interpreter and say what it enforces here")
    check.add_argument("--code-interpreter", metavar="ENGINE", help="`auto`, `native`, `docker` or `remote`")
    apparmor = _command(actions, "apparmor", _sandbox_apparmor, "let its Python make user namespaces; needs root")
    apparmor.add_argument("--remove", action="store_true", help="take that back")
    for command in (setup, check, serve, apparmor):
        command.add_argument("--config", metavar="FILE", help="TOML file with any of the settings")
        command.add_argument("--sandbox-env", metavar="DIR", help="the folder of the packages")


# --- the commands ----------------------------------------------------------------------------------------------


def _serve(options: argparse.Namespace) -> int:
    from afterglow.serve import serve

    loaded = _load(options)
    telemetry.configure(loaded.log_format, loaded.log_level)
    serve(loaded, partial(print, flush=True), work=options.work)
    return 0


def _worker(options: argparse.Namespace) -> int:
    from afterglow.serve import run_worker

    loaded = _load(options)
    telemetry.configure(loaded.log_format, loaded.log_level)
    run_worker(loaded, partial(print, flush=True))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from afterglow.demo import run_demo

    return run_demo(options.model_url, options.model_key, options.model)


def _doctor(options: argparse.Namespace) -> int:
    from afterglow.doctor import examine

    return examine(_load(options), print)


def _version(options: argparse.Namespace) -> int:
    print(f"afterglow {__version__}, Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from afterglow.audit import operator
    from afterglow.projects import name_project
    from afterglow.transfer import import_objects

    project = named_project(options)
    report = _with_store(
        options,
        lambda store: import_objects(store, project, options.paths, dry_run=options.dry_run),
    )
    for line in report.lines():
        print(line)
    if not options.dry_run:
        _with_store(options, lambda store: name_project(store, time.time(), operator(), project))
        _note(options, "data.imported", project, {"paths": [path.name for path in options.paths]})
    return 0 if report.ok else 1


def _export(options: argparse.Namespace) -> int:
    from afterglow.transfer import export_objects

    project = named_project(options)
    report = _with_store(options, lambda store: export_objects(store, project, options.path))
    for line in report.lines():
        print(line)
    _note(options, "data.exported", project, {"path": options.path.name})
    return 0 if report.ok else 1


def _backup(options: argparse.Namespace) -> int:
    from afterglow.backup import back_up

    back_up(_load(options), options.path, partial(print, flush=True))
    _note(options, "data.backed_up", "", {"path": options.path.name})
    return 0


def _restore(options: argparse.Namespace) -> int:
    from afterglow.backup import restore

    restore(_load(options), options.path, partial(print, flush=True))
    _note(options, "data.restored", "", {"path": options.path.name})
    return 0


def _note(options: argparse.Namespace, type: str, project: str, details: Json) -> None:
    """Note in the audit log what a command has done. project: "" for all of them."""
    from afterglow.audit import note, operator

    _with_store(options, lambda store: note(store, operator(), type, project, details))


def _migrate(options: argparse.Namespace) -> int:
    from afterglow.migrate import migrate, shown_on

    cluster = _load(options)
    folder = dataclasses.replace(
        cluster, data=options.source or options.target, database_url="", database_listen_url="", blob_url=""
    )
    source, target = (folder, cluster) if options.source else (cluster, folder)
    migrate(source, target, partial(print, flush=True), shown_on(sys.stderr), force=options.force)
    return 0


def _reindex(options: argparse.Namespace) -> int:
    from afterglow.vector_stores import reindex

    count = _with_store(options, lambda store: reindex(store, time.time(), options.store_id))
    print(f"{count} files will be indexed anew by the server: now if it is running, else when it starts.")
    return 0


def _sandbox_setup(options: argparse.Namespace) -> int:
    if sys.platform != "linux":
        print("Nothing to set up: here the code interpreter runs in Docker, whose image brings its own packages.")
        return 0
    from afterglow.sandbox import packages

    packages.setup(packages.environment(_load(options)), options.level, options.python, partial(print, flush=True))
    return 0


def _sandbox_check(options: argparse.Namespace) -> int:
    from afterglow.doctor import examine_code_interpreter

    return examine_code_interpreter(_load(options), print)


def _sandbox_serve(options: argparse.Namespace) -> int:
    from afterglow.sandbox import pod

    pod.serve(_load(options), options.host, options.port)


def _sandbox_apparmor(options: argparse.Namespace) -> int:
    from afterglow.sandbox import apparmor, packages

    if options.remove:
        apparmor.remove_profile(print)
    else:
        apparmor.add_profile(packages.describe(packages.environment(_load(options))), print)
    return 0


if __name__ == "__main__":
    sys.exit(main())
