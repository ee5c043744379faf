"""What /healthz says of the engines."""

from __future__ import annotations

import pytest

from afterglow import __version__
from afterglow.contracts import EngineStatus
from tests.api.wire import Wire
from tests.conftest import Server

UNBOUNDED = "the memory of a session is not fully bounded"


async def test_a_code_interpreter_that_is_whole(server: Server, wire: Wire):
    """Engines are `on` or `off`; where there is nothing to explain, nothing more is said."""
    assert (await wire.get("//healthz")).json == {
        "status": "ok",
        "version": __version__,
        "engines": {"code_interpreter": "on", "file_search": "on"},
    }


@pytest.mark.parametrize(
    ("status", "details"),
    [
        (
            EngineStatus("off", reason="No.", remedy="Do this."),
            {"reason": "No.", "remedy": "Do this.", "unenforced": []},
        ),
        (
            EngineStatus("on", "native", unenforced=(UNBOUNDED,)),
            {"reason": "", "remedy": "", "unenforced": [UNBOUNDED]},
        ),
    ],
)
async def test_a_code_interpreter_that_is_not(
    server: Server, wire: Wire, status: EngineStatus, details: dict[str, object]
):
    """An engine that is off, or cannot enforce everything, says why, and what to do about it."""
    server.code.status = status
    answer = (await wire.get("//healthz")).json
    assert answer["status"] == "ok"
    assert answer["engines"]["code_interpreter"] == status.state
    assert answer["details"] == {"code_interpreter": details}


async def test_while_it_starts(server: Server, wire: Wire):
    """The wall is built after the first answers: until then the engine is `starting`."""
    server.code.status = EngineStatus("starting")
    answer = (await wire.get("//healthz")).json
    assert answer["engines"]["code_interpreter"] == "starting"
    assert "details" not in answer


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("No packages in /srv/app/.venv/sandbox.", "No packages in …"),
        ("open('/home/me/x y'): Permission denied", "open('… y'): Permission denied"),
        ("unshare: Operation not permitted (AppArmor and/or seccomp)", None),
        ("/proc/sys/kernel/unprivileged_userns_clone is 0; memory below /sys/fs/cgroup; 512 MB for /mnt/data", None),
        ("see https://docs.example.com/page", None),
        ("~/.local/share/afterglow is gone", "… is gone"),
    ],
)
async def test_no_path_of_the_host_is_shown(server: Server, wire: Wire, reason: str, shown: str | None):
    """Whoever asks without a key does not learn where things lie; the kernel's own files are the same everywhere."""
    server.code.status = EngineStatus("off", reason=reason)
    details = (await wire.get("//healthz")).json["details"]["code_interpreter"]
    assert details["reason"] == (shown or reason)
