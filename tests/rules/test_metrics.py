"""What Prometheus reads: whole, escaped, complete from the start, and only from the one list."""

from __future__ import annotations

import ast
import gc
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from aioprometheus.formats.text import TextFormatter
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from ifabric import __version__
from ifabric import metrics as module
from ifabric.cli.metrics import described, document
from ifabric.errors import StartupError
from ifabric.metrics import CHILDREN_MAX, METRICS, Metric, Metrics
from tests.conftest import needed

ROOT = Path(__file__).parent.parent.parent
NAMES = {metric.name for metric in METRICS}


def read(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample, as Prometheus understands it. A sample that is there twice is an error there, and here."""
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def samples(metrics: Metrics, name: str) -> dict[frozenset[tuple[str, str]], float]:
    return {labels: value for (sample, labels), value in read(metrics).items() if sample == name}


def labelled(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset(labels.items())


# -- the list --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_says_its_kind_and_its_unit(metric: Metric) -> None:
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.startswith(("if_", "process_", "python_"))
    assert metric.help.endswith(".")
    assert "milli" not in metric.name
    assert not {"session", "task", "request_id", "le"} & set(metric.labels)
    assert list(metric.buckets) == sorted(set(metric.buckets))
    if metric.kind == "histogram":
        assert metric.name.endswith(("_seconds", "_size", "_bytes", "_score"))


def test_no_name_is_there_twice() -> None:
    assert len(NAMES) == len(METRICS)


def used() -> dict[str, list[tuple[str, set[str], Path]]]:
    """The names that the code counts by: kind, labels and where."""
    found: dict[str, list[tuple[str, set[str], Path]]] = {}
    for path in [*(ROOT / "ifabric").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("counter", "gauge", "histogram")
                and node.args
                and isinstance(node.args[0], ast.Constant)
            ):
                labels = {word.arg for word in node.keywords if word.arg}
                found.setdefault(str(node.args[0].value), []).append((node.func.attr, labels, path))
    return found


def test_what_the_code_counts_is_in_the_list_with_its_kind_and_labels() -> None:
    listed = {metric.name: metric for metric in METRICS}
    for name, calls in used().items():
        assert name in listed, f"{name} in {calls[0][2]} is not in METRICS"
        for kind, labels, path in calls:
            assert (listed[name].kind, set(listed[name].labels)) == (kind, labels), f"{name} in {path}"


def test_what_is_in_the_list_is_counted_somewhere() -> None:
    assert NAMES - set(used()) == set(), "a metric that nobody counts is a promise that is not kept"


def test_a_name_that_is_not_in_the_list_is_an_error() -> None:
    metrics = Metrics()
    with pytest.raises(AssertionError, match="if_nonsense_total is not in METRICS"):
        metrics.counter("if_nonsense_total")


def test_a_wrong_kind_and_wrong_labels_are_errors() -> None:
    metrics = Metrics()
    with pytest.raises(AssertionError, match="is a counter"):
        metrics.gauge("if_coordinator_claims_total", outcome="granted")
    for labels in ({}, {"outcome": "granted", "task": "t"}, {"why": "x"}):
        with pytest.raises(AssertionError, match="has the labels"):
            metrics.counter("if_coordinator_claims_total", **labels)


def test_more_label_sets_than_prometheus_should_bear_are_dropped_and_counted() -> None:
    metrics = Metrics()
    for number in range(CHILDREN_MAX):
        metrics.gauge("if_actor_in_flight", actor=str(number)).set(1)
        metrics.histogram("if_actor_handling_seconds", actor=str(number), verb="claim").observe(1)
    metrics.gauge("if_actor_in_flight", actor="one more").set(7)
    metrics.histogram("if_actor_handling_seconds", actor="one more", verb="claim").observe(1)
    metrics.gauge("if_actor_in_flight", actor="7").set(3)
    found = samples(metrics, "if_actor_in_flight")
    assert len(found) == CHILDREN_MAX and labelled(actor="one more") not in found
    assert found[labelled(actor="7")] == 3, "those that are there go on"
    assert samples(metrics, "if_metrics_dropped_total") == {labelled(): 2}


# -- the document ----------------------------------------------------------------------------------------------------


def test_the_document_is_up_to_date() -> None:
    """Otherwise: `ifabric metrics --markdown > config/deploy/monitoring/METRICS.md`."""
    assert (ROOT / "config/deploy/monitoring/METRICS.md").read_text() == document()


def test_the_document_has_a_row_for_every_metric_with_its_unit_and_the_known_values() -> None:
    rows = {line.split("`")[1]: line for line in document().splitlines() if line.startswith("| `")}
    assert rows.keys() == NAMES
    assert "| seconds | actor, verb |" in rows["if_actor_handling_seconds"]
    assert "| micro-USD | purpose (work, coordination) |" in rows["if_governor_charged_micro_usd_total"]
    assert "| seconds since the epoch | part |" in rows["if_certificate_expiry_timestamp_seconds"]
    assert all(line.count(" | ") == 4 for line in rows.values())


def test_as_data_a_histogram_has_its_buckets_and_labels_their_values() -> None:
    listed = {metric.name: described(metric) for metric in METRICS}
    assert listed["if_store_commit_batch_size"]["buckets"][0] == 1
    assert listed["if_chassis_workers"]["known"] == [{"state": "idle"}, {"state": "busy"}]
    assert listed["if_ready"] == {
        "name": "if_ready", "type": "gauge", "unit": "", "labels": [], "known": [],
        "meaning": "1 while requests can be served (/readyz), else 0.",
    }  # fmt: skip


# -- promtool --------------------------------------------------------------------------------------------------------

#: what promtool would have otherwise, and why it is so all the same
ACCEPTED = {
    'if_chassis_sandbox_count non-histogram and non-summary metrics should not have "_count" suffix'
}  # the runbook's
HOSTILE = 'x"} 1\nif_ready 5\n# HELP if_ready \\ {forged="1",actor="'


def promtool(page: bytes, *words: str) -> subprocess.CompletedProcess[bytes]:
    with needed("promtool"):
        at = ROOT / ".tools/deploy/usr/bin/promtool"
        found = str(at) if at.exists() else shutil.which("promtool")
        if found is None:
            raise StartupError("not there: `just deploy-programs` fetches it")
    return subprocess.run([found, "check", "metrics", *words], input=page, capture_output=True, check=False)


def complaints(page: bytes) -> set[str]:
    checked = promtool(page)
    assert checked.returncode in (0, 3), checked.stderr.decode()  # 3: it can be read, but
    return {line for line in checked.stderr.decode().splitlines() if line}


def without_accepted(page: bytes) -> bytes:
    """promtool counts series only where it has nothing to complain about."""
    names = {line.split()[0].encode() for line in ACCEPTED}
    return b"\n".join(line for line in page.split(b"\n") if not any(name in line for name in names))


def test_promtool_has_nothing_against_the_page_but_what_is_meant() -> None:
    assert complaints(Metrics().render()) == ACCEPTED


def test_promtool_reads_a_hostile_label_as_one_label_of_one_metric() -> None:
    plain, hostile = Metrics(), Metrics()
    for metrics, text in ((plain, "x"), (hostile, HOSTILE)):
        for metric in METRICS:
            if metric.labels:
                child = getattr(metrics, metric.kind)(metric.name, **dict.fromkeys(metric.labels, text))
                child.observe(1) if metric.kind == "histogram" else None
    assert complaints(hostile.render()) == ACCEPTED
    counted = [promtool(without_accepted(metrics.render()), "--extended").stdout for metrics in (plain, hostile)]
    assert b"if_ready" in counted[0]
    assert sorted(counted[0].splitlines()) == sorted(counted[1].splitlines()), (
        "as many series of each metric, to the last one"
    )


def test_what_promtool_must_not_see_it_would_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the escaping the test above would not pass."""
    monkeypatch.setattr(module, "SafeText", TextFormatter)
    metrics = Metrics()
    metrics.gauge("if_actor_in_flight", actor=HOSTILE).set(1)
    assert promtool(metrics.render()).returncode == 1


# -- what is read ----------------------------------------------------------------------------------------------------


def test_every_metric_is_announced_with_its_help_and_kind() -> None:
    text = Metrics().render().decode()
    for metric in METRICS:
        assert f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n" in text


def test_every_label_set_that_is_known_is_there_from_the_start_at_zero() -> None:
    metrics = Metrics()
    for metric in METRICS:
        if metric.name.startswith(("process_", "python_")) or (metric.labels and not metric.born):
            continue
        suffix = "_count" if metric.kind == "histogram" else ""
        born = {
            frozenset(zip(metric.labels, values, strict=True)): 0.0
            for values in (metric.born if metric.labels else ((),))
        }
        assert samples(metrics, metric.name + suffix) == born


def test_what_the_process_says_of_itself_is_true() -> None:
    found = {name: value for (name, labels), value in read(Metrics()).items() if name.startswith("process_")}
    assert 1e6 < found["process_resident_memory_bytes"] < 1e11
    assert found["process_open_fds"] >= 3
    assert found["process_cpu_seconds_total"] > 0
    assert found["process_start_time_seconds"] > 1.7e9
    assert found["process_virtual_memory_bytes"] > found["process_resident_memory_bytes"]
    assert found["process_open_fds"] < found["process_max_fds"]


def test_what_python_says_of_its_collector_is_true() -> None:
    before = samples(Metrics(), "python_gc_collections_total")
    gc.collect()
    after = samples(Metrics(), "python_gc_collections_total")
    assert set(after) == {labelled(generation=str(number)) for number in range(3)}
    assert after[labelled(generation="2")] > before[labelled(generation="2")]


def test_the_build_is_told() -> None:
    found = samples(Metrics(), "if_build_info")
    assert found == {labelled(version=__version__, python=platform.python_version()): 1}


@pytest.mark.parametrize(
    "value",
    [
        'x"} 1\nif_bus_connected 1\n# ',
        'x",outcome="ok"} 5\nforged{a="',
        "back\\slash",
        "ends with \\",
        '\\"',
        "line\nfeed",
        "carriage\rreturn",
        "",
        "{}",
        "ü 任务 \U0001f980",
    ],
)
def test_a_hostile_label_value_forges_nothing(value: str) -> None:
    before = set(read(Metrics()))
    metrics = Metrics()
    metrics.gauge("if_actor_mailbox_depth", actor=value).set(7)
    assert set(read(metrics)) - before == {("if_actor_mailbox_depth", labelled(actor=value))}
    assert read(metrics)["if_actor_mailbox_depth", labelled(actor=value)] == 7


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3, unique=True))
def test_any_label_value_is_read_as_it_was_written(values: list[str]) -> None:
    metrics = Metrics()
    for number, value in enumerate(values):
        metrics.counter("if_actor_restarts_total", actor=value).inc(number)
    assert samples(metrics, "if_actor_restarts_total") == {
        labelled(actor=value): number for number, value in enumerate(values)
    }


def test_a_counter_grows_and_a_total_counted_elsewhere_never_shrinks_it() -> None:
    metrics = Metrics()
    counter = metrics.counter("if_bus_reconnects_total")
    counter.inc()
    counter.inc(2)
    counter.raise_to(2)
    assert samples(metrics, "if_bus_reconnects_total") == {labelled(): 3}
    counter.raise_to(9)
    assert samples(metrics, "if_bus_reconnects_total") == {labelled(): 9}


def test_the_same_labels_are_the_same_child_in_any_order() -> None:
    metrics = Metrics()
    one = metrics.counter("if_actor_dropped_total", actor="a", why="b")
    assert metrics.counter("if_actor_dropped_total", why="b", actor="a") is one
    assert metrics.counter("if_actor_dropped_total", why="c", actor="a") is not one


@pytest.mark.parametrize(
    "name", [metric.name for metric in METRICS if metric.kind == "histogram" and not metric.labels]
)
@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(0, 1000), max_size=30))
def test_a_histograms_buckets_are_cumulative_and_end_with_all(name: str, values: list[float]) -> None:
    metrics = Metrics()
    histogram = metrics.histogram(name)
    for value in values:
        histogram.observe(value)
    page = read(metrics)
    found = {dict(labels)["le"]: count for (sample, labels), count in page.items() if sample == f"{name}_bucket"}
    bounds = next(metric.buckets for metric in METRICS if metric.name == name)
    assert {float(bound) for bound in found} == {*bounds, float("inf")}
    assert all(count == sum(value <= float(bound) for value in values) for bound, count in found.items())
    assert page[f"{name}_count", labelled()] == len(values)
    assert page[f"{name}_sum", labelled()] == pytest.approx(sum(values))


def test_gauges_are_brought_up_to_date_before_each_reading() -> None:
    metrics = Metrics()
    readings: list[int] = []

    def update() -> None:
        readings.append(1)
        metrics.gauge("if_loop_lag_seconds").set(len(readings))

    metrics.before_render.append(update)
    assert [samples(metrics, "if_loop_lag_seconds")[labelled()] for _ in range(2)] == [1, 2]


def test_two_registries_share_nothing() -> None:
    one, other = Metrics(), Metrics()
    one.gauge("if_bus_connected").set(1)
    assert samples(other, "if_bus_connected") == {labelled(): 0}


def test_a_gauge_may_be_set_to_whether_something_is_so() -> None:
    metrics = Metrics()
    metrics.gauge("if_bus_connected").set(True)
    assert samples(metrics, "if_bus_connected") == {labelled(): 1}
