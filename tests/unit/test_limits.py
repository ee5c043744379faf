"""Token buckets: what they let pass, what they tell, and how processes share them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.errors import TooManyRequests
from afterglow.limits import Holder, Limiter, duration
from afterglow.objects import Limits

NOW = 1_700_000_000.0
ASSISTANTS = "/v1/assistants"
RUN = "/v1/threads/thread_1/runs/run_1"
RUNS = "/v1/threads/thread_1/runs"


def limiter(*, shared: bool = False, key: Limits | None = None, **limits: int) -> Limiter:
    made = Limiter(shared=shared)
    holders = [Holder("p", "", Limits(**limits))]
    if key is not None:
        holders.append(Holder("p", "key_1", key))
    made.believe("p", "key_1", *holders)
    return made


def admitted(limits: Limiter, path: str = ASSISTANTS, method: str = "GET", now: float = NOW) -> bool:
    try:
        limits.admit("p", "key_1", method, path, now)
    except TooManyRequests:
        return False
    return True


def test_without_limits_nothing_is_told():
    """Where no limit is set there are no headers, and every request passes."""
    limits = limiter()
    assert [limits.admit("p", "key_1", "GET", ASSISTANTS, NOW) for _ in range(1000)] == [{}] * 1000
    assert limits.admit("other", "key_2", "GET", ASSISTANTS, NOW) == {}


def test_a_minute_may_come_at_once():
    """A full bucket lets a minute's worth pass at once, then as much as a minute brings, evenly."""
    limits = limiter(requests_per_minute=6)
    assert [admitted(limits) for _ in range(8)] == [True] * 6 + [False] * 2
    assert [admitted(limits, now=NOW + after) for after in (9.9, 10, 10.1, 20)] == [False, True, False, True]
    assert [admitted(limits, now=NOW + 600) for _ in range(8)] == [True] * 6 + [False] * 2


def test_what_is_refused_is_not_paid_for():
    """A storm of refused requests does not put off the moment from which on one passes."""
    limits = limiter(requests_per_minute=60)
    assert sum(admitted(limits) for _ in range(500)) == 60
    assert admitted(limits, now=NOW + 1)


def test_the_headers_are_those_that_clients_read():
    """Limit, what is left and when all is there again; and with a refusal how long to wait."""
    limits = limiter(requests_per_minute=2, tokens_per_minute=600)
    assert limits.admit("p", "key_1", "GET", ASSISTANTS, NOW) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "30s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "0ms",
    }
    limits.admit("p", "key_1", "GET", ASSISTANTS, NOW)
    with pytest.raises(TooManyRequests) as refused:
        limits.admit("p", "key_1", "GET", ASSISTANTS, NOW + 7.5)
    assert (refused.value.type, refused.value.code, refused.value.status) == ("requests", "rate_limit_exceeded", 429)
    assert refused.value.headers == {
        "retry-after": "23",
        "retry-after-ms": "22500",
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "52.5s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "0ms",
    }
    assert refused.value.message == (
        "Rate limit reached in project p on requests per min (RPM): Limit 2, Used 2. Please try again in 22.5s."
    )


def test_polls_are_counted_apart():
    """Polling takes nothing from the requests, and is bounded only by a limit of its own."""
    limits = limiter(requests_per_minute=1)
    assert admitted(limits)
    assert all(admitted(limits, RUN) for _ in range(1000))
    limits = limiter(requests_per_minute=1, polls_per_minute=2)
    assert [admitted(limits, RUN) for _ in range(3)] == [True, True, False]
    assert admitted(limits)


@pytest.mark.parametrize(
    ("method", "path", "is_poll"),
    [
        ("GET", RUN, True),
        ("GET", "/openai/threads/thread_1/runs/run_1", True),
        ("GET", "/v1/vector_stores/vs_1", True),
        ("GET", "/v1/vector_stores/vs_1/files/file-1", True),
        ("GET", "/v1/vector_stores/vs_1/file_batches/vsfb_1", True),
        ("GET", "/v1/files/file-1", True),
        ("POST", RUN, False),
        ("DELETE", "/v1/files/file-1", False),
        ("GET", RUNS, False),
        ("GET", f"{RUN}/steps", False),
        ("GET", f"{RUN}/steps/step_1", False),
        ("GET", "/v1/threads/thread_1/messages", False),
        ("GET", "/v1/files/file-1/content", False),
        ("GET", "/v1/vector_stores", False),
    ],
)
def test_what_a_poll_is(method: str, path: str, is_poll: bool):
    """Reading one run, store, file or batch is a poll; lists, contents and changes are requests."""
    limits = limiter(requests_per_minute=0)
    assert admitted(limits, path, method) is is_poll


def test_tokens_are_paid_for_afterwards():
    """What the model server reports may overdraw the bucket; then no run is created until it has recovered, and
    everything else goes on."""
    limits = limiter(tokens_per_minute=600)
    assert admitted(limits, RUNS, "POST")
    limits.spend("p", "key_1", 1200, NOW)
    for path in (RUNS, "/v1/threads/runs"):
        with pytest.raises(TooManyRequests) as refused:
            limits.admit("p", "key_1", "POST", path, NOW)
    assert (refused.value.type, refused.value.headers["retry-after-ms"]) == ("tokens", "60100")
    assert refused.value.headers["x-ratelimit-remaining-tokens"] == "0"
    assert admitted(limits, RUNS)
    assert admitted(limits, "/v1/threads", "POST")
    assert not admitted(limits, RUNS, "POST", NOW + 60)
    assert admitted(limits, RUNS, "POST", NOW + 60.2)


def test_a_key_has_limits_beside_its_projects():
    """Whichever is used up first refuses; a refusal by one costs the other nothing, and the scarcer one is told."""
    limits = limiter(requests_per_minute=3, key=Limits(requests_per_minute=2))
    told = limits.admit("p", "key_1", "GET", ASSISTANTS, NOW)
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert [admitted(limits) for _ in range(2)] == [True, False]
    limits.believe("p", "key_2", Holder("p", "", Limits(requests_per_minute=3)))
    limits.admit("p", "key_2", "GET", ASSISTANTS, NOW)
    with pytest.raises(TooManyRequests, match="in project p on requests"):
        limits.admit("p", "key_2", "GET", ASSISTANTS, NOW)


def test_a_limit_of_zero_lets_nothing_pass():
    """Zero is a limit, not the absence of one; the wait that is told is finite."""
    limits = limiter(requests_per_minute=0)
    with pytest.raises(TooManyRequests) as refused:
        limits.admit("p", "key_1", "GET", ASSISTANTS, NOW)
    assert refused.value.headers["retry-after"] == "86400"


def test_new_limits_hold_at_once():
    """A limit that is lowered, raised or taken off holds from when it is believed."""
    limits = limiter(requests_per_minute=100)
    assert admitted(limits)
    limits.believe("p", "key_1", Holder("p", "", Limits(requests_per_minute=1)))
    assert [admitted(limits) for _ in range(2)] == [True, False]
    limits.believe("p", "key_1", Holder("p", "", Limits()))
    assert all(admitted(limits) for _ in range(10))


def test_what_was_taken_is_told_to_the_others_once():
    """Only where it is shared; what could not be told is kept, and what others took is taken here as well."""
    alone = limiter(requests_per_minute=10)
    admitted(alone)
    alone.spend("p", "key_1", 5, NOW)
    assert alone.take_unshared() == {}
    limits = limiter(shared=True, requests_per_minute=10)
    admitted(limits)
    admitted(limits)
    limits.spend("p", "key_1", 5, NOW)
    taken = limits.take_unshared()
    assert taken == {("p", "", "requests"): 2, ("p", "", "tokens"): 5, ("p", "key_1", "tokens"): 5}
    assert limits.take_unshared() == {}
    limits.put_back(taken)
    admitted(limits)
    assert limits.take_unshared()["p", "", "requests"] == 3
    limits.adopt(("p", "", "requests"), 1.0, NOW)
    assert [admitted(limits) for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0ms"), (0.012, "12ms"), (0.9991, "1s"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (90.25, "1m30.25s")),
        *((360, "6m0s"), (3600, "1h0m0s"), (86400, "24h0m0s")),
    ],
)
def test_durations_are_written_as_the_original_does(seconds: float, text: str):
    """In hours, minutes, seconds and milliseconds, rounded up."""
    assert duration(seconds) == text


@given(st.integers(1, 100), st.lists(st.floats(0, 5), max_size=200))
def test_no_window_lets_more_pass_than_a_full_bucket_and_what_it_brings(limit: int, pauses: list[float]):
    """Whatever the rhythm, in any span of time no more pass than a minute's worth and what the span brings."""
    limits, now, passed = limiter(requests_per_minute=limit), NOW, 0
    for pause in pauses:
        now += pause
        passed += admitted(limits, now=now)
        assert passed <= limit + (now - NOW) * limit / 60 + 1e-6
