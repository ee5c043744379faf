"""Metrics: named as Prometheus wants it, few in number whoever calls, and all of them documented."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from afterglow.metrics import MAX_MODELS, OTHER, Metrics
from afterglow.objects import Usage

PAGE = Path(__file__).parent.parent.parent / "docs" / "observability.md"
USAGE = Usage(prompt_tokens=10, completion_tokens=5, total_tokens=15)
UNIT = re.compile(r"_(seconds|rows)$")


def labels(metrics: Metrics, family: str, label: str) -> set[str]:
    return {
        sample.labels[label] for found in metrics.registry.collect() if found.name == family for sample in found.samples
    }


def test_any_number_of_models_makes_few_series():
    """Ten times as many models as may be told apart: the first keep their names, and no token is lost."""
    metrics = Metrics()
    for number in [*range(9 * MAX_MODELS), *range(MAX_MODELS)]:
        metrics.model_answered(f"model-{number}", USAGE, 0.1, 0.2)
    first = {f"model-{number}" for number in range(MAX_MODELS)}
    assert labels(metrics, "afterglow_model_tokens", "model") == {*first, OTHER}
    counted = [
        sample.value
        for family in metrics.collect()
        if family.name == "afterglow_model_tokens"
        for sample in family.samples
        if sample.labels["kind"] == "prompt"
    ]
    assert sum(counted) == 10 * MAX_MODELS * USAGE.prompt_tokens


def test_callers_make_no_labels():
    """A method that nobody knows, and a path that no route takes, are `other`; prefixes are one."""
    metrics = Metrics()
    for prefix in ("/v1", "/openai/v1", "/openai"):
        metrics.request_answered("GET", f"{prefix}/threads/{{thread_id}}", 200, 0.01)
    metrics.request_answered("BREW", None, 404, 0.01)
    metrics.request_answered("GET", "/healthz", 200, 0.01)
    assert labels(metrics, "afterglow_http_requests", "route") == {"/v1/threads/{thread_id}", OTHER, "/healthz"}
    assert labels(metrics, "afterglow_http_requests", "method") == {"GET", OTHER}
    assert labels(metrics, "afterglow_http_requests", "status") == {"2xx", "4xx"}


def test_the_text_is_read_by_prometheus():
    """Its own parser takes every line, and what it reads is what was counted, without times of creation."""
    metrics = Metrics()
    metrics.runs_ended.labels("failed").inc(3)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    ended = {sample.labels["status"]: sample.value for sample in families["afterglow_runs_ended"].samples}
    assert ended == {"cancelled": 0, "completed": 0, "expired": 0, "failed": 3, "incomplete": 0}
    assert "process_cpu_seconds" in families
    assert not [name for name in families if name.endswith("_created")]


def test_two_bundles_share_nothing():
    """There is no registry of the process: what one counts, the other does not."""
    one, other = Metrics(), Metrics()
    one.leases_lost.inc()
    assert b"\nafterglow_run_leases_lost_total 1.0\n" in one.text()
    assert b"\nafterglow_run_leases_lost_total 0.0\n" in other.text()


def test_names_follow_the_conventions():
    """All of ours begin with `afterglow_`; histograms end with their unit; each says what it is."""
    for family in Metrics().registry.collect():
        if family.name.startswith("process_"):
            continue
        assert re.fullmatch(r"afterglow(_[a-z]+)*", family.name)
        assert family.type != "histogram" or UNIT.search(family.name), family.name
        assert family.documentation.endswith(".")


def test_every_metric_is_documented():
    """The table of docs/observability.md has exactly the metrics of the registry, each with its kind and labels."""
    metrics = Metrics()
    said = dict(re.findall(r"^\| `(afterglow\w*)(?:\{.*\})?` \| (\w+) \|", PAGE.read_text("utf-8"), re.MULTILINE))
    ours = [family for family in metrics.registry.collect() if family.name.startswith("afterglow")]
    suffix = {"counter": "_total", "info": "_info"}
    assert said == {family.name + suffix.get(family.type, ""): family.type.replace("info", "gauge") for family in ours}


def test_every_label_is_documented():
    """A metric with labels is in the table with these labels."""
    page = PAGE.read_text("utf-8")
    metrics = Metrics()
    for collector in set(metrics.registry._names_to_collectors.values()):
        names = ",".join(getattr(collector, "_labelnames", ()))
        if names:
            assert re.search(rf"^\| `{collector._name}(_total)?{{{names}}}` \|", page, re.MULTILINE), collector._name
