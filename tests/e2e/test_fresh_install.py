"""What a user gets from the package: built from the sources and installed where nothing else is."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import httpx2
import pytest

from afterglow import __version__
from tests.e2e.clients import install_or_skip
from tests.e2e.processes import ROOT, run, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    install_or_skip(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-cache-dir", "--no-deps", "--wheel-dir", folder, ROOT
    )
    (made,) = folder.iterdir()
    return made


def test_the_wheel_holds_what_is_needed(wheel: Path):
    """The package with its SQL, lock files and mark of types is in the wheel, and nothing else of the checkout."""
    assert wheel.name == f"afterglow-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    sources = [path for path in (ROOT / "afterglow").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert inside == {path.relative_to(ROOT).as_posix() for path in sources}
    assert {"afterglow/sandbox/locks/base.txt", "afterglow/store/sql/0001_first.sql", "afterglow/py.typed"} <= inside
    assert "LICENSE" in about


async def test_installed_where_nothing_else_is(wheel: Path, tmp_path: Path):
    """From the wheel alone the command runs, serves, and says what the demo needs beyond it."""
    install_or_skip(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    install_or_skip(python, "-m", "pip", "install", "--quiet", "--no-cache-dir", wheel)
    command = tmp_path / "venv" / "bin" / "afterglow"

    ended = await run(command, "version", cwd=tmp_path)
    assert ended.out.startswith(f"afterglow {__version__}, Python {sys.version.split()[0]}")
    ended = await run(command, "demo", cwd=tmp_path)
    assert (ended.code, ended.out) == (1, "")
    assert "pip install 'afterglow[demo]'" in ended.err
    async with serving(tmp_path, program=(command,)) as served, httpx2.AsyncClient(verify=False) as plain:
        answer = await plain.post(f"{served.url}/threads", headers={"authorization": "Bearer any"})
        assert answer.json()["object"] == "thread"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is nothing to set up")
async def test_the_interpreters_packages(wheel: Path, tmp_path: Path):
    """From the wheel, `sandbox setup` makes an environment that has the packages compiled and pip no more, once."""
    install_or_skip(sys.executable, "-m", "venv", tmp_path / "venv")
    install_or_skip(tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-cache-dir", wheel)
    command = tmp_path / "venv" / "bin" / "afterglow"
    install_or_skip(command, "sandbox", "setup")

    made = tmp_path / "venv" / "sandbox"
    again = await run(command, "sandbox", "setup", cwd=tmp_path)
    assert (again.code, again.out) == (0, f"Already there: base, Python {sys.version.split()[0]}, in {made}\n")
    trying = "import matplotlib.pyplot, openpyxl, pandas, PIL; print(pandas.DataFrame({'a': [1, 2]}).a.sum())"
    tried = await run(made / "bin" / "python", "-I", "-B", "-c", trying, cwd=tmp_path)
    assert tried.out == "3\n"
    tried = await run(made / "bin" / "python", "-I", "-c", "import pip", cwd=tmp_path)
    assert "No module named 'pip'" in tried.err
    [packages] = made.glob("lib/python3.*/site-packages")
    compiled = list((packages / "pandas").rglob("*.pyc"))
    assert len(compiled) >= len(list((packages / "pandas").rglob("*.py")))
    assert all(int.from_bytes(file.read_bytes()[4:8], "little") == 1 for file in compiled)  # PEP 552: never checked
    assert len(list((made / "matplotlib").glob("fontlist-*.json"))) == 1
