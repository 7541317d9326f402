"""The rules, the routes and their tests: read by promtool and amtool, and held against what the daemons export."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from ifabric.metrics import LATENCY_S, METRICS
from tests.system.scraping import MONITORING, RULES, hurried, recorded, shipped, tool

UNIT_TESTS = sorted((Path(__file__).parent / "rules").glob("*.yml"))
ALERTS = shipped()
PLAYBOOKS = {
    *("outage", "latency", "degraded", "etcd-down", "etcd-no-quorum", "etcd-slow", "etcd-full", "nats-down"),
    *("slow-consumer", "loop-lag", "actor-restarts", "low-success", "budget", "breaker", "breaker-flapping"),
    *("hold-leak", "unmatched", "sandbox-violation", "sandbox-memory", "slo", "event-lag", "audit", "backup-age"),
    *("certificates", "target-down", "security"),
}
#: the runbook's, with what its table says besides
RUNBOOK = {
    "CoordinatorHighLatency": ("critical", "if-coordinator", "5m"),
    "CoordinatorLowSuccessRate": ("critical", "if-coordinator", "5m"),
    "CoordinatorEtcdDisconnected": ("critical", "if-coordinator", "1m"),
    "GovernorBudgetExhausted": ("warning", "if-governor", "5m"),
    "GovernorCircuitBreakerOpen": ("warning", "if-governor", "1m"),
    "ChassisSandboxEscape": ("critical", "if-chassis", "1m"),
    "ChassisMemoryHigh": ("warning", "if-chassis", "5m"),
    "EtcdNoLeader": ("critical", "etcd", "1m"),
    "EtcdHighDiskLatency": ("warning", "etcd", "5m"),
}
#: every name of its tables, alerts and dashboard
NAMES = {
    *("if_coordinator_claim_latency_p95", "if_coordinator_claim_latency_bucket", "if_coordinator_claim_success_rate"),
    *("if_coordinator_active_tasks", "if_coordinator_event_bus_health", "if_coordinator_cas_failures"),
    *("if_coordinator_active_sessions", "if_governor_budget_utilization", "if_governor_capability_match_score"),
    *("if_governor_capability_match_failures_total", "if_governor_circuit_breaker_open"),
    *("if_governor_cost_overhead_percent", "if_chassis_sandbox_count", "if_chassis_memory_usage_mb"),
    *("if_chassis_memory_limit_mb", "if_chassis_sandbox_escapes", "if_chassis_slo_violations"),
}
#: what a PromQL expression may name besides metrics of ours: of etcd, of Prometheus, and what it makes itself
FOREIGN = re.compile(r"etcd_[a-z_]+|prometheus_[a-z_]+|up|ALERTS")


@cache
def exported() -> set[str]:
    """The names that a scrape of a daemon brings."""
    found = set()
    for metric in METRICS:
        endings = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        found |= {metric.name + ending for ending in endings}
    return found


def names_of(expression: str) -> set[str]:
    """The metrics that an expression names, as far as they could be ours, etcd's or Prometheus's."""
    bare = re.sub(r'"[^"]*"|\'[^\']*\'', '""', expression)
    return set(re.findall(r"\b(?:(?:if|process|etcd|prometheus)_[a-z0-9_]+|if:[a-z0-9_:]+|up|ALERTS)\b", bare))


def unknown(expression: str) -> set[str]:
    """Those that nobody exports and no rule records."""
    return {n for n in names_of(expression) - exported() - recorded() if not FOREIGN.fullmatch(n)}


def said(*command: str) -> str:
    """What a program says; it has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# -- the rules --------------------------------------------------------------------------------------------------------


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    """As they are shipped, and as the tests hurry them."""
    assert len(RULES) >= 7
    said(tool("promtool"), "check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_every_alert_fires_and_ends_as_its_unit_test_says(path: Path) -> None:
    """With the labels and annotations that are expected."""
    said(tool("promtool"), "test", "rules", str(path))


def test_no_alert_is_without_a_unit_test_that_sees_it_silent_firing_and_silent_again() -> None:
    seen: dict[str, list[list[bool]]] = {}
    for path in UNIT_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            checks = test["alert_rule_test"]
            assert {check["alertname"] for check in checks} == {test["name"]}
            for check in checks:
                assert all(alert.keys() == {"exp_labels", "exp_annotations"} for alert in check["exp_alerts"])
            seen.setdefault(test["name"], []).append([bool(check["exp_alerts"]) for check in checks])
    assert seen.keys() == ALERTS.keys()
    for name, tests in seen.items():
        assert all(fired[0] is False and any(fired) and fired[-1] is False for fired in tests), name


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_bad_it_is_whom_it_concerns_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["labels"]["component"] in {
        *("if-coordinator", "if-governor", "if-chassis", "etcd", "nats", "fabric", "monitoring"),
    }
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    link = re.fullmatch(r"\{\{ \$externalLabels\.ifabric \}\}/playbooks/([a-z-]+)", rule["annotations"]["runbook_url"])
    assert link is not None and link[1] in PLAYBOOKS, rule["annotations"]["runbook_url"]
    described = rule["annotations"]["description"]
    told = "$value" in described or ".Value" in described or "| value" in described
    assert told or name == "TargetsMissing", "the value is told"
    assert ("SECURITY" in described) == (rule["labels"].get("security") == "high")


def test_every_playbook_that_is_linked_is_there() -> None:
    """As soon as the pages are: each link leads to one."""
    folder = MONITORING.parents[2] / "ifabric/playbooks"
    pages = {path.stem for path in folder.glob("*.md")}
    if not pages:
        pytest.skip("the pages are not there yet")
    linked = {rule["annotations"]["runbook_url"].rpartition("/")[2] for rule in ALERTS.values()}
    assert linked <= pages, linked - pages


@pytest.mark.parametrize("name", RUNBOOK)
def test_the_runbooks_alerts_are_there_as_it_wants_them(name: str) -> None:
    rule = ALERTS[name]
    assert (rule["labels"]["severity"], rule["labels"]["component"], rule["for"]) == RUNBOOK[name]
    assert (rule["labels"].get("security") == "high") == (name == "ChassisSandboxEscape")


def test_every_name_of_the_runbook_is_exported_or_recorded() -> None:
    known = exported() | recorded() | {metric.name for metric in METRICS}
    assert known >= NAMES, NAMES - known


def test_no_name_is_both_exported_and_recorded() -> None:
    """A rule that reads what it writes would keep the largest value for ever."""
    assert not exported() & recorded()


def test_the_rules_name_no_metric_that_nobody_exports() -> None:
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                texts = [rule["expr"], *re.findall(r'"([^"{]+\{?.*?)" \| first|query "(.*?)" ?\}', str(rule))]
                for text in texts:
                    for one in text if isinstance(text, tuple) else (text,):
                        assert not unknown(one), (rule.get("alert", rule.get("record")), unknown(one))


def test_the_histogram_in_milliseconds_has_the_daemons_buckets() -> None:
    rules = yaml.safe_load((MONITORING / "rules/recording.yml").read_text())["groups"][0]["rules"]
    copied = {
        re.search(r'le="(.*?)"', rule["expr"])[1]: rule["labels"]["le"]  # type: ignore[index]
        for rule in rules
        if rule["record"] == "if_coordinator_claim_latency_bucket"
    }
    assert list(copied) == [*(str(float(bound)) for bound in LATENCY_S), "+Inf"]
    for seconds, milliseconds in copied.items():
        assert float(milliseconds) == pytest.approx(1000 * float(seconds)), seconds


def test_hurrying_changes_nothing_but_windows_and_waits() -> None:
    """So that what the tests against a real Prometheus see are the shipped expressions."""
    for path in RULES:
        before, after = (yaml.safe_load(text) for text in (path.read_text(), hurried(path.read_text())))
        for one, other in zip(before["groups"], after["groups"], strict=True):
            for rule, quick in zip(one["rules"], other["rules"], strict=True):
                assert {**rule, "expr": "", "for": "", "annotations": ""} == {
                    **quick,
                    "expr": "",
                    "for": "",
                    "annotations": "",
                }
                assert re.sub(r"\[\w+\]", "[]", rule["expr"]) == re.sub(r"\[\w+\]", "[]", quick["expr"])


# -- where alerts go --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "receivers"),
    [
        (("severity=critical",), "pagerduty,slack"),
        (("severity=warning",), "slack"),
        (("severity=critical", "security=high"), "security-team,pagerduty,slack"),
        (("severity=warning", "security=high"), "security-team,slack"),
        ((), "slack"),
    ],
)
def test_an_alert_goes_to_whom_it_concerns(labels: tuple[str, ...], receivers: str) -> None:
    config = str(MONITORING / "alertmanager.yml")
    assert said(tool("amtool"), "config", "routes", "test", f"--config.file={config}", *labels) == receivers


def test_every_key_is_in_a_file_and_every_receiver_is_used() -> None:
    config = yaml.safe_load((MONITORING / "alertmanager.yml").read_text())
    said(tool("amtool"), "check-config", str(MONITORING / "alertmanager.yml"))
    files = {value for key, value in walk(config) if key.endswith("_file")}
    assert {Path(file).parent for file in files} == {Path("/etc/alertmanager/secrets")}
    assert not any(re.search(r"(_key|api_url|password|token)$", key) for key, _ in walk(config))
    used = {config["route"]["receiver"], *(route["receiver"] for route in config["route"]["routes"])}
    assert used == {receiver["name"] for receiver in config["receivers"]}
    assert "match" not in config["route"], "`matchers` is today's form"


def test_an_alert_is_muted_only_by_one_that_is_there() -> None:
    """The rules of inhibition name alerts that exist, never mute the source itself, and share the labels they compare."""
    config = yaml.safe_load((MONITORING / "alertmanager.yml").read_text())
    for rule in config["inhibit_rules"]:
        named = [matching(rule[side]) for side in ("source_matchers", "target_matchers")]
        assert all(named), rule
        assert not named[0] & named[1], f"mutes itself: {rule}"


def matching(matchers: list[str]) -> set[str]:
    """The alerts that exist of those that a matcher names; each of its alternatives is one of them."""
    (pattern,) = (re.fullmatch(r'alertname=~?"(.*)"', m)[1] for m in matchers if m.startswith("alertname"))  # type: ignore[index]
    for alternative in pattern.split("|"):
        assert any(re.fullmatch(alternative, name) for name in ALERTS), f"there is no alert {alternative}"
    return {name for name in ALERTS if re.fullmatch(pattern, name)}


def walk(found: Any) -> list[tuple[str, Any]]:
    """Every key of a document with its value, wherever it is."""
    if isinstance(found, dict):
        return [pair for key, value in found.items() for pair in ((str(key), value), *walk(value))]
    return [pair for value in found for pair in walk(value)] if isinstance(found, list) else []
