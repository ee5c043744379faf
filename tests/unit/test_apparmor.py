"""The AppArmor profile: written, loaded and taken back, with a stand-in for apparmor_parser and a root of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from afterglow.errors import ConfigError
from afterglow.sandbox import apparmor
from afterglow.sandbox.packages import RESTRICTION, Packages


class System:
    """An Ubuntu, as far as this goes. loaded: what apparmor_parser was called with. said: what the command said."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.file = self.root / "etc/apparmor.d/afterglow-sandbox"
        self.said: list[str] = []
        self._folder = folder
        (self.root / RESTRICTION.relative_to("/")).parent.mkdir(parents=True)
        (self.root / RESTRICTION.relative_to("/")).write_text("1\n")
        (folder / "env/bin").mkdir(parents=True)
        self.program = folder / "env/bin/python3.11"
        self.program.write_text("a Python")
        (folder / "env/bin/python").symlink_to("python3.11")
        self.parser_says(0)

    @property
    def packages(self) -> Packages:
        return Packages(self._folder / "env", "current", "base", self._folder / "env/bin/python")

    @property
    def loaded(self) -> list[str]:
        calls = self._folder / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def parser_says(self, status: int, words: str = "") -> None:
        parser = self._folder / "apparmor_parser"
        parser.write_text(f"#!/bin/sh\necho \"$@\" >>'{self._folder}/calls'\necho '{words}' >&2\nexit {status}\n")
        parser.chmod(0o755)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    monkeypatch.setattr(apparmor, "PARSERS", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return System(tmp_path)


def add(system: System) -> None:
    apparmor.add_profile(system.packages, system.said.append, system.root)


def remove(system: System) -> None:
    apparmor.remove_profile(system.said.append, system.root)


def test_the_profile(system: System):
    """It frees the environment's own program to make user namespaces, by its path and no other, and is loaded."""
    add(system)
    text = system.file.read_text()
    assert f'\nprofile afterglow-sandbox "{system.program}" flags=(unconfined) {{\n  userns,\n' in text
    assert text.startswith("# Written by `afterglow sandbox apparmor`")
    assert system.file.stat().st_mode & 0o777 == 0o644
    assert system.loaded == [f"--replace {system.file}"]
    assert system.said[0] == f"Wrote and loaded {system.file}: {system.program} may make user namespaces."


def test_it_can_be_taken_back(system: System):
    """--remove unloads and deletes it; a second time there is nothing to remove."""
    add(system)
    remove(system)
    remove(system)
    assert not system.file.exists()
    assert system.loaded[1:] == [f"--remove {system.file}"]
    assert system.said[-2:] == [
        f"Unloaded and deleted {system.file}.",
        f"There is no {system.file}: nothing to remove.",
    ]


def test_a_kernel_without_the_restriction(system: System):
    """Where AppArmor does not restrict user namespaces, nothing is written, and that is said."""
    (system.root / RESTRICTION.relative_to("/")).unlink()
    add(system)
    assert not system.file.exists()
    assert system.said == [
        "This kernel does not restrict user namespaces by AppArmor: no profile is needed, and none was written."
    ]


def test_without_root(system: System, monkeypatch: pytest.MonkeyPatch):
    """An ordinary user is told to use sudo, and nothing is written."""
    add(system)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for act in (add, remove):
        with pytest.raises(ConfigError, match=r"needs root\. Run this command with sudo\."):
            act(system)
    assert len(system.loaded) == 1


def test_a_link_is_refused(system: System, tmp_path: Path):
    """A program that is a link to another folder's gets no profile: that would free every program of that Python."""
    elsewhere = tmp_path / "python3.11"
    system.program.rename(elsewhere)
    system.program.symlink_to(elsewhere)
    with pytest.raises(ConfigError, match="would free every program of that Python"):
        add(system)
    assert not system.file.exists()


def test_no_environment(system: System):
    """Without an environment it says how to make one, and how to name it."""
    with pytest.raises(
        ConfigError, match=r"Make it with `afterglow sandbox setup`, .* name its folder with --sandbox-env"
    ):
        apparmor.add_profile(Packages(Path("/nowhere"), "missing"), print, system.root)


def test_a_path_that_means_something_else(system: System, tmp_path: Path):
    """A path with a profile's special characters is refused: it could free other programs."""
    folder = tmp_path / "a{b,c}*"
    (tmp_path / "env").rename(folder)
    with pytest.raises(ConfigError, match="characters that mean something else"):
        apparmor.add_profile(Packages(folder, "current", "base", folder / "bin/python"), print, system.root)


def test_a_profile_that_is_not_taken(system: System):
    """When the parser refuses it, its words are shown, and the file is as it was before."""
    system.parser_says(1, "AppArmor parser error: unknown rule userns")
    with pytest.raises(ConfigError, match="It said: AppArmor parser error: unknown rule userns"):
        add(system)
    assert not system.file.exists()
    system.file.write_text("an earlier one")
    with pytest.raises(ConfigError):
        add(system)
    assert system.file.read_text() == "an earlier one"


def test_the_system_s_parser_comes_first(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What root runs is the system's parser, whatever is found first by the caller's PATH."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/apparmor_parser").write_text(f"#!/bin/sh\ntouch {tmp_path}/fooled\n")
    (tmp_path / "mine/apparmor_parser").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "mine"), prepend=os.pathsep)
    add(system)
    assert len(system.loaded) == 1
    assert not (tmp_path / "fooled").exists()


def test_an_environment_of_the_server_s_user(system: System):
    """Root adds the profile for an environment that is another user's, and says who could use it, too."""
    found = system.packages._replace(state="unsafe")
    if found.python.stat().st_uid == 0:
        os.chown(found.python, 4242, -1)
    apparmor.add_profile(found, system.said.append, system.root)
    assert "Its owner is not root: whoever can replace that file can use the profile, too." in system.said


def test_without_the_parser(system: System, monkeypatch: pytest.MonkeyPatch):
    """A system without apparmor_parser is told what to install."""
    monkeypatch.setattr(apparmor.shutil, "which", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="apt-get install apparmor"):
        add(system)
