"""The configuration is read whole or refused, and a refusal names the file, the line and the key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from ifabric.config import Config, smells
from ifabric.config_file import DEPTH_MAX, ERRORS_MAX, PREFIX, load
from ifabric.errors import ConfigError

SHIPPED = Path(__file__).parent.parent.parent / "config" / "fabric.yaml"

#: the coordinator's file of the operators' handbook, as it stands there
RUNBOOK = """\
coordinator:
  backend: etcd

  etcd:
    endpoints:
      - https://etcd-1.prod.infrafabric.io:2379
      - https://etcd-2.prod.infrafabric.io:2379
      - https://etcd-3.prod.infrafabric.io:2379

    timeout_seconds: 5

    # TLS (required in production)
    ca_cert: /etc/infrafabric/certs/ca.crt
    cert_file: /etc/infrafabric/certs/coordinator-client.crt
    key_file: /etc/infrafabric/certs/coordinator-client.key

  # Task TTL (auto-expire stale claims)
  task_claim_ttl_seconds: 300  # 5 minutes

  # Metrics
  metrics:
    enabled: true
    port: 9090
    path: /metrics

  # Logging
  logging:
    level: INFO  # DEBUG for troubleshooting
    format: json
    output: /var/log/infrafabric/coordinator.log
"""


class Files:
    """Configuration files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, text: str | bytes, name: str = "c.yaml") -> Path:
        path = self.folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def read(self, *texts: str | bytes, **environ: str) -> Config:
        paths = [self.write(text, f"c{number}.yaml") for number, text in enumerate(texts)]
        return load(paths, environ)[0]

    def refusals(self, text: str | bytes, **environ: str) -> list[str]:
        """What is wrong, a line each, without the folder's name."""
        with pytest.raises(ConfigError) as caught:
            load([self.write(text)], environ)
        return caught.value.message.replace(f"{self.folder}/", "").splitlines()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def structs(struct: type[msgspec.Struct] = Config, at: str = "") -> Iterator[tuple[str, type[msgspec.Struct]]]:
    """Every section, by its path."""
    yield at, struct
    for field in msgspec.structs.fields(struct):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from structs(field.type, f"{at}.{field.name}".lstrip("."))


# -- the file that ships ---------------------------------------------------------------------------------------------


def test_the_shipped_file_says_exactly_the_defaults() -> None:
    config, warnings = load([SHIPPED], {})
    assert config == Config()
    assert warnings == []


@pytest.mark.parametrize(("at", "struct"), list(structs()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_key_is_in_the_shipped_file_under_its_section(at: str, struct: type[msgspec.Struct]) -> None:
    lines = SHIPPED.read_text().splitlines()
    for section in at.split(".") if at else ():
        first = next(number for number, line in enumerate(lines) if line.strip().startswith(f"{section}:"))
        indent = len(lines[first]) - len(lines[first].lstrip())
        last = next(
            (n for n in range(first + 1, len(lines)) if re.match(rf" {{0,{indent}}}[#a-z]", lines[n])), len(lines)
        )
        lines = lines[first + 1 : last] or lines[first : first + 1]
    text = "\n".join(lines)
    for field in msgspec.structs.fields(struct):
        assert re.search(rf"^\s*(# )?.*\b{field.name}\b[:,]", text, re.MULTILINE), f"{at}.{field.name} is not mentioned"


def test_the_keys_in_comments_of_the_shipped_file_are_known_too(files: Files) -> None:
    live = re.sub(r"^(\s*)# (\w+: \S)", r"\1\2", SHIPPED.read_text(), flags=re.MULTILINE)
    config = files.read(live)
    assert config.nats.nkey_seed_file == "/etc/infrafabric/daemon.nk"
    assert config.coordinator.metrics.port == 9090


def test_the_runbooks_file_works_as_it_is(files: Files) -> None:
    config, warnings = load([files.write(RUNBOOK)], {})
    assert len(config.coordinator.etcd.endpoints) == 3
    assert config.coordinator.task_claim_ttl_seconds == 300
    assert config.coordinator.metrics.port == 9090
    assert config.coordinator.logging.output == "/var/log/infrafabric/coordinator.log"
    assert any("a dead agent's tasks wait up to 300 s" in warning for warning in warnings)


RUNBOOK_GOVERNOR = """
governor:
  coordinator: {url: "https://coordinator.prod.infrafabric.io:8080", timeout_seconds: 5}
  budget: {enabled: true, default_session_budget: 40.00, cost_tracking_interval: 60}
  capabilities: {enabled: true, min_match_score: 0.7, cache_enabled: true, cache_ttl_seconds: 300, cache_max_entries: 10000}
  circuit_breaker: {enabled: true, failure_threshold: 5, reset_timeout: 60}
  metrics: {enabled: true, port: 9091}
  logging: {level: INFO, format: json, output: /var/log/infrafabric/governor.log}
"""


def test_the_runbooks_section_of_the_governor_works_as_it_is_and_says_what_is_without_effect(files: Files) -> None:
    config, warnings = load([files.write(RUNBOOK_GOVERNOR)], {})
    assert config.governor.budget.default_session_micro_usd == 40_000_000
    assert config.governor.metrics.port == 9091
    assert [warning.split(" does nothing")[0] for warning in warnings] == ["governor.coordinator", "governor.logging"]


RUNBOOK_CHASSIS = """
chassis:
  runtime: {engine: wasmtime, max_memory_mb: 512, max_cpu_percent: 50, max_execution_time_seconds: 300}
  credentials:
    vault_addr: https://vault.prod.infrafabric.io:8200
    vault_token_path: /etc/infrafabric/vault-token
  slo: {target_latency_p95_ms: 10, target_availability_percent: 99.9}
  sandbox_pool: {enabled: true, min_size: 10, max_size: 100}
  metrics: {enabled: true, port: 9092}
  logging: {level: INFO, format: json, output: /var/log/infrafabric/chassis.log}
"""


def test_the_runbooks_section_of_the_chassis_works_as_it_is_and_says_what_is_without_effect(files: Files) -> None:
    config, warnings = load([files.write(RUNBOOK_CHASSIS)], {})
    assert config.chassis.sandbox_pool.max_size == 100
    assert config.chassis.credentials.vault_token_path == "/etc/infrafabric/vault-token"
    assert [warning.split(" does nothing")[0] for warning in warnings] == ["chassis.logging"]


def test_a_misspelt_key_of_an_endpoint_or_its_credential_is_named_where_it_stands(files: Files) -> None:
    lines = files.refusals(
        "chassis:\n  credentials: {vault_addr: 'https://v:8200', vault_token_path: /t}\n  endpoints:\n    llm:\n      url: https://a.example\n      metods: [POST]\n"
        "      credential:\n        vault_path: secret/data/a\n        feld: key\n"
    )
    assert lines == [
        "c.yaml:6: unknown key chassis.endpoints.llm.metods; did you mean `methods`?",
        "c.yaml:9: unknown key chassis.endpoints.llm.credential.feld; did you mean `field`?",
    ]


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ("runtime: {max_memory_mb: 0}", "max_memory_mb"),
        ("runtime: {max_fuel: -1}", "max_fuel"),
        ("runtime: {max_cpu_percent: 0}", "max_cpu_percent"),
        ("runtime: {max_execution_time_seconds: -5}", "max_execution_time_seconds"),
        ("runtime: {max_tables: -1}", "max_tables"),
        ("runtime: {engine: wasmer}", "engine"),
        ("sandbox_pool: {min_size: 9, max_size: 3}", "min_size"),
        ("endpoints: {a: {url: 'https://u:p@a.example'}}", "url"),
        ("endpoints: {a: {url: 'https://a.example', networks: [10.1.0.0]}}", "networks"),
        ("endpoints: {a: {url: 'https://a.example', networks: [ten]}}", "networks"),
        ("endpoints: {a: {url: 'https://a.example', credential: {vault_path: x}}}", "vault_addr"),
        ("credentials: {vault_addr: 'https://v:8200'}", "vault_token_path"),
        ("price: {per_gb_second_usd: -1}", "per_gb_second_usd"),
    ],
)
def test_a_limit_that_would_be_none_is_refused(files: Files, section: str, word: str) -> None:
    lines = files.refusals(f"chassis: {{{section}}}\n")
    assert any(word in line for line in lines), lines


@pytest.mark.parametrize(
    ("written", "micro_usd"),
    [("40.00", 40_000_000), ("0.1", 100_000), ("0.000001", 1), ("0", 0), ('"1234567.654321"', 1_234_567_654_321)],
)
def test_an_amount_is_exact_to_the_millionth(files: Files, written: str, micro_usd: int) -> None:
    config = files.read(f"governor: {{budget: {{default_session_budget: {written}}}}}\n")
    assert config.governor.budget.default_session_micro_usd == micro_usd


@pytest.mark.parametrize("written", ["-1", "0.0000001", ".nan", ".inf", "9000000001", "1e30", "forty", "[1]", "true"])
def test_what_is_no_amount_is_refused_with_its_place(files: Files, written: str) -> None:
    (line,) = files.refusals(f"governor:\n  budget: {{default_session_budget: {written}}}\n")
    assert line.startswith("c.yaml:2: governor.budget"), line


def test_a_breaker_that_its_own_settings_keep_shut_is_warned_about(files: Files) -> None:
    text = "governor: {circuit_breaker: {failure_threshold: 3, minimum_calls: 10}}\n"
    _, warnings = load([files.write(text)], {})
    assert any("minimum_calls is above failure_threshold" in warning for warning in warnings)


# -- merging ---------------------------------------------------------------------------------------------------------


def test_later_files_win_maps_are_merged_and_lists_replaced(files: Files) -> None:
    config = files.read(
        "http: {host: 127.0.0.2, port: 1}\nnats: {servers: [nats://a:1, nats://b:1]}\n",
        "http: {port: 2}\nnats: {servers: [nats://c:1]}\n",
    )
    assert (config.http.host, config.http.port) == ("127.0.0.2", 2)
    assert config.nats.servers == ("nats://c:1",)


@pytest.mark.parametrize("empty", ["", "# nothing\n", "http:\n", "http:\n  # port: 5\n"])
def test_an_empty_section_takes_nothing_away(files: Files, empty: str) -> None:
    assert files.read("http: {port: 7}\n", empty).http.port == 7
    assert files.read(empty) == Config()


def test_the_environment_wins_over_files_and_its_values_are_yaml(files: Files) -> None:
    config = files.read(
        "http: {port: 7, host: 127.0.0.2}\n",
        IFABRIC__HTTP__PORT="9",
        IFABRIC__COORDINATOR__ETCD__ENDPOINTS="[http://127.0.0.1:1, http://127.0.0.1:2]",
        IFABRIC__COORDINATOR__METRICS="{enabled: no}",
        IFABRIC_NATS="nats://not-a-key",
    )
    assert (config.http.port, config.http.host) == (9, "127.0.0.2")
    assert config.coordinator.etcd.endpoints == ("http://127.0.0.1:1", "http://127.0.0.1:2")
    assert not config.coordinator.metrics.enabled


def test_coordinator_config_names_a_file_that_is_read_first(files: Files) -> None:
    named = files.write("http: {port: 7}\nmailbox_max: 5\n", "named.yaml")
    config = files.read("http: {port: 8}\n", COORDINATOR_CONFIG=str(named))
    assert (config.http.port, config.mailbox_max) == (8, 5)


def test_a_residents_own_section_passes_through(files: Files) -> None:
    config = files.read("options: {mine: {a: [1, {b: c}], when: 2026-01-02}}\n")
    assert config.section("mine")["a"] == [1, {"b": "c"}]
    assert config.section("yours") == {}
    assert config.section("coordinator") is config.coordinator


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().mailbox_max = 1  # type: ignore[misc]


# -- what is wrong, and where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("htpp: {}\n", "c.yaml:1: unknown key htpp; did you mean `http`?"),
        ("http:\n  host: h\n  prot: 1\n", "c.yaml:3: unknown key http.prot; did you mean `port`?"),
        (
            "coordinator:\n  etcd:\n    timeout: 5\n    enpoints: []\n",
            "c.yaml:4: unknown key coordinator.etcd.enpoints; did you mean `endpoints`?",
        ),
        ("http: {zzz: 1}\n", "c.yaml:1: unknown key http.zzz; known are cert_file, client_ca, host, key_file, port"),
        ("http:\n  port: many\n", "c.yaml:2: http.port: expected `int`, got `str`"),
        ("http: {port: 65536}\n", "c.yaml:1: http.port: expected `int` <= 65535"),
        ("http:\n\n  port: -1\n", "c.yaml:3: http.port: expected `int` >= 0"),
        ("coordinator: []\n", "c.yaml:1: coordinator: expected `object`, got `array`"),
        ("coordinator: {backend: git}\n", "c.yaml:1: coordinator.backend: invalid enum value 'git'"),
        (
            "coordinator: {metrics: {path: m}}\n",
            "c.yaml:1: coordinator.metrics.path: expected `str` matching regex '^/'",
        ),
        (
            "nats: {connect_timeout_seconds: .nan}\n",
            "c.yaml:1: nats.connect_timeout_seconds: expected `float` > 0.0",
        ),
        (
            "drain_timeout_seconds: .inf\n",
            "c.yaml:1: drain_timeout_seconds: expected `float` <= 86400.0",
        ),
        ("actors:\n", "c.yaml:1: actors: expected `array`, got `null`"),
        ("http: 5\nactors: [coordinator, coordinator]\n", "c.yaml:1: http: expected `object`, got `int`"),
        ("mailbox_max: 3\nactors: [a, a]\n", "c.yaml:2: actors: one is named twice"),
        ("http:\n  port: 1\n  port: 2\n", "c.yaml:3: http.port is given twice"),
        ("- a\n", "c.yaml:1: the file is to be a map of sections"),
        ("a: [1\nb: 2\n", "c.yaml:2: not YAML: expected ',' or ']', but got ':'"),
        ("http: {port: 1}\n---\nhttp: {}\n", "c.yaml:2: not YAML: but found another document"),
        ("a: \x01\n", "c.yaml: not YAML: special characters are not allowed"),
        (b"a: \xff\n", "c.yaml: cannot be read: not UTF-8"),
        ("state_dir: 2024-99-99\n", "c.yaml:1: state_dir: month must be in 1..12"),
        ("http: {port: !!int abc}\n", "c.yaml:1: http.port: invalid literal for int() with base 10: 'abc'"),
        ("http: {port: !!float ''}\n", "c.yaml:1: http.port: string index out of range"),
        (
            "state_dir: !!python/name:os.system x\n",
            "c.yaml:1: state_dir: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
        ),
        (
            "http: !!python/object:os.system {}\n",
            "c.yaml:1: http: the tag tag:yaml.org,2002:python/object:os.system means nothing here",
        ),
        ("? [a]\n: c\n", "c.yaml:1: the file: a key is a word, not a list, a map or a merge"),
        ("a: &a {}\nhttp:\n  <<: *a\n", "c.yaml:3: http: a key is a word, not a list, a map or a merge"),
    ],
)
def test_what_is_wrong_is_said_with_its_line_and_path(files: Files, text: str | bytes, line: str) -> None:
    assert line in files.refusals(text)


def test_several_errors_are_told_at_once_each_where_it_was_written(files: Files) -> None:
    text = "http:\n  port: x\nnats:\n  servers:\n  - 1\n  - nats://a:1\n  - 2\n  sevrers: []\nmailbox_max: 0\n"
    assert sorted(files.refusals(text)) == [
        "c.yaml:2: http.port: expected `int`, got `str`",
        "c.yaml:5: nats.servers.0: expected `str`, got `int`",
        "c.yaml:7: nats.servers.2: expected `str`, got `int`",
        "c.yaml:8: unknown key nats.sevrers; did you mean `servers`?",
        "c.yaml:9: mailbox_max: expected `int` >= 1",
    ]


def test_what_could_not_be_read_is_not_complained_of_twice(files: Files) -> None:
    assert len(files.refusals("http: {port: !!int abc}\n")) == 1
    assert len(files.refusals("", IFABRIC__HTTP__PORT="[1")) == 1


def test_of_very_many_errors_only_so_many_are_told(files: Files) -> None:
    assert len(files.refusals("".join(f"k{number}: 1\n" for number in range(1000)))) == ERRORS_MAX


def test_an_error_in_a_merged_configuration_names_the_file_that_wrote_it(files: Files) -> None:
    first, second = files.write("http: {port: x}\n", "a.yaml"), files.write("\nnats: {servers: [1]}\n", "b.yaml")
    with pytest.raises(ConfigError) as caught:
        load([first, second], {})
    assert f"{first}:1: http.port" in caught.value.message
    assert f"{second}:2: nats.servers.0" in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("HTTP__PROT", "9", "unknown key http.prot; did you mean `port`?"),
        ("HTTP__PORT", "99999", "http.port: expected `int` <= 65535"),
        ("HTTP__PORT", "[1", "not YAML: expected ',' or ']', but got '<stream end>'"),
        ("HTTP__PORT", "", "http.port: expected `int`, got `null`"),
        ("HTTP__PORT", "[" * 3000, "not YAML: nested too deeply"),
        ("STATE_DIR", "2024-99-99", "state_dir: month must be in 1..12"),
        ("NATS__SERVERS", "[nats://a:1, 5]", "nats.servers.1: expected `str`, got `int`"),
        ("__".join("A" * (DEPTH_MAX + 1)), "1", "longer than any key or value"),
    ],
)
def test_an_error_in_the_environment_names_the_variable(files: Files, name: str, value: str, line: str) -> None:
    text = "nats: {servers: [nats://x:1]}\n"
    assert files.refusals(text, **{PREFIX + name: value}) == [f"${PREFIX}{name}: {line}"]


def test_a_file_that_cannot_be_read_is_named_with_the_reason(files: Files) -> None:
    absent = files.folder / "absent.yaml"
    with pytest.raises(ConfigError, match=f"{absent}: cannot be read: No such file"):
        load([absent], {})
    with pytest.raises(ConfigError, match="absent.yaml: cannot be read"):
        load([], {"COORDINATOR_CONFIG": str(absent)})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load([files.folder], {})


# -- what is allowed and probably not meant --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("coordinator: {etcd: {pool_size: 5}}", "pool_size and pool_recycle do nothing"),
        ("coordinator: {etcd: {endpoints: ['https://10.0.0.1:2379']}}", "there is no ca_cert"),
        ("coordinator: {etcd: {endpoints: ['http://10.0.0.1:2379']}}", "without https"),
        ("coordinator: {etcd: {timeout_seconds: 0.1}}", "there will be one attempt"),
        ("coordinator: {task_claim_ttl_seconds: 121}", "wait up to 121 s"),
        ("http: {host: 0.0.0.0}", "reachable from other machines"),
        ("nats: {servers: ['nats://127.0.0.1:4222']}", "the other server is an embedded one"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(files: Files, text: str, says: str) -> None:
    assert any(says in warning for warning in smells(files.read(text)))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_is_no_reason_to_warn(host: str, files: Files) -> None:
    assert smells(files.read(f"http: {{host: '{host}'}}")) == []
