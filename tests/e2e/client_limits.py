"""What the official Python client makes of keys that may not do everything, and of limits.

    python client_limits.py BASE_URL READER LIMITED

READER: a key that may only read. LIMITED: one that is limited to 600 requests a minute, and has few of them left.
Works with every SDK from 1.40 on. Fails unless each refusal is the kind of error that apps catch, and waiting cures it.
"""

from __future__ import annotations

import sys

import openai

url, reader, limited = sys.argv[1:]


def client(key: str, max_retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=max_retries, timeout=20, project="proj_of_old")


def refused(kind: type[openai.APIStatusError], act: object) -> openai.APIStatusError:
    try:
        act()  # type: ignore[operator]
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def until_limited() -> None:
    api = client(limited)
    for _ in range(1000):
        answer = api.beta.assistants.with_raw_response.list()
        assert int(answer.headers["x-ratelimit-limit-requests"]) == 600
        assert int(answer.headers["x-ratelimit-remaining-requests"]) < 600
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")


denied = refused(openai.PermissionDeniedError, lambda: client(reader).beta.assistants.create(model="m"))
assert denied.code == "missing_scope", denied.code
assert client(reader).beta.assistants.list().data == []
unknown = refused(openai.AuthenticationError, client("sk-nobody-has-this").beta.assistants.list)
assert unknown.code == "invalid_api_key", unknown.code
slow_down = refused(openai.RateLimitError, until_limited)
assert slow_down.code == "rate_limit_exceeded", slow_down.code
assert slow_down.response.headers["retry-after"] == "1"
assert 0 < int(slow_down.response.headers["retry-after-ms"]) <= 100
for _ in range(5):
    assert client(limited, max_retries=2).beta.assistants.list().data == []
print("as it should be")
