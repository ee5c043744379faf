"""`afterglow serve` with a certificate of its own."""

from __future__ import annotations

import asyncio
import re
import signal
import ssl
from pathlib import Path

import httpx2
import openai
import pytest

from tests.e2e.processes import afterglow, environment, run, serving

pytestmark = pytest.mark.slow


async def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for `localhost`, signed by itself, and its key."""
    chain, key = folder / f"{name}.pem", folder / f"{name}.key"
    subject = ("-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    made = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", 2)
    try:
        ended = await run("openssl", "req", *made, *subject, "-keyout", key, "-out", chain)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert ended.code == 0, ended.err
    return chain, key


async def shown(url: str, chain: Path) -> bool:
    """Whether a new connection to the server shows this certificate."""
    try:
        async with httpx2.AsyncClient(verify=ssl.create_default_context(cafile=str(chain))) as client:
            return bool((await client.get(url.removesuffix("/v1") + "/healthz")).status_code == 200)
    except httpx2.ConnectError:
        return False


async def test_the_official_client_over_https(tmp_path: Path):
    """The greeting says https, the client trusts it, and a certificate that is put in its place is shown on SIGHUP; one
    that cannot be used is not. TLS 1.1 is refused."""
    chain, key = await certificate(tmp_path, "first")
    async with serving(tmp_path, "--tls-cert", chain, "--tls-key", key) as served:
        assert served.url.startswith("https://127.0.0.1:")
        trusting = openai.DefaultAsyncHttpxClient(verify=ssl.create_default_context(cafile=str(chain)))
        async with openai.AsyncOpenAI(base_url=served.url, api_key="k", http_client=trusting) as client:
            assistant = await client.beta.assistants.create(model="offline")
            stream = await client.beta.threads.create_and_run(assistant_id=assistant.id, stream=True)
            assert [event.event async for event in stream][-1] in ("thread.run.completed", "done")
        port = re.findall(r":(\d+)", served.url)[0]
        old = await run("openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_1")
        assert old.code != 0
        first, second = chain.read_bytes(), await certificate(tmp_path, "second")
        for text in (b"no certificate", second[0].read_bytes()):
            chain.write_bytes(text)
            if text != b"no certificate":
                key.write_bytes(second[1].read_bytes())
            served.process.send_signal(signal.SIGHUP)
            (tmp_path / "first-was.pem").write_bytes(first)
            async with asyncio.timeout(10):
                while served.log.count("TLS certificate") < (1 if text == b"no certificate" else 2):
                    await asyncio.sleep(0.01)
            assert await shown(served.url, tmp_path / "first-was.pem") == (text == b"no certificate")
        assert await shown(served.url, second[0])


async def test_certificates_that_cannot_be_used(tmp_path: Path):
    """A missing file, or one that is no key, is told at the start."""
    chain, _ = await certificate(tmp_path, "first")
    for key in (tmp_path / "none", chain):
        ended = await afterglow("serve", "--data", tmp_path / "data", "--tls-cert", chain, "--tls-key", key)
        assert ended.code == 1
        assert "tls_cert and tls_key cannot be used" in ended.err
        assert "Traceback" not in ended.err
    env = environment(AFTERGLOW_TLS_CERT=str(chain))
    assert "one needs the other" in (await afterglow("serve", "--data", tmp_path / "data", env=env)).err
