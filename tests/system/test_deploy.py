"""config/deploy and the production configurations, read by what production reads them with: docker-compose, promtool,
amtool, systemd, nats-server, etcd and the daemon's own loader. No container engine runs here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from ifabric.clock import SystemClock
from ifabric.config import Config
from ifabric.config_file import load
from ifabric.embedded import Server, free_port, http_get
from ifabric.errors import StartupError
from ifabric.pki import Authority
from ifabric.programs import find_etcd, find_nats_server
from ifabric.testing.clusters import HOSTS
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from tests.conftest import needed
from tests.system.deployment import COMPOSE, DEPLOY, ROOT, compose, nats_conf, unit

PROGRAMS = ROOT / ".tools/deploy/usr"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
TIMERS = sorted((DEPLOY / "systemd").glob("*.timer"))
DAEMONS = ("coordinator", "governor", "chassis")
ETCDS = ("etcd-1", "etcd-2", "etcd-3")
#: files that an operator makes: with `ifabric bootstrap nats` and `agent create`, and two by hand, as the README says
SECRETS = {
    *("daemon.nk", "issuer.nk", "system.nk", "nats-1.conf", "nats-2.conf", "nats-3.conf"),
    *("vault-token", "grafana-admin", "alertmanager", "backup.nk"),
}
SERVICES = compose()["services"]
ENVIRONMENT = {"IFABRIC_UID": "1000", "IFABRIC_GID": "1000", "IFABRIC_OPERATORS": "{ann: UABC}"}


def program(name: str) -> str:
    """Of a suite that is newer than a laptop's, or on PATH. Missing: skipped there, an error in CI."""
    with needed(name):
        for at in (PROGRAMS / "libexec/docker/cli-plugins" / name, PROGRAMS / "bin" / name):
            if at.exists():
                return str(at)
        if (found := shutil.which(name)) is None:
            raise StartupError("not there: `just deploy-programs` fetches it (systemd-analyze: package systemd)")
    return found


def said(*command: str, **environ: str) -> str:
    """What a program says; it has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environ})
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


# -- the production configurations ------------------------------------------------------------------------------------


def production(*names: str) -> tuple[Config, list[str]]:
    """The configuration of a host: these files, in their order."""
    return load([ROOT / f"config/{name}.production.yaml" for name in names], {})


#: what is meant, and said all the same
TTL = "coordinator.task_claim_ttl_seconds: a dead agent's tasks wait up to 300 s, and twice that when etcd's leader changes"
NO_COORDINATOR = "governor.coordinator does nothing: governor and coordinator meet in etcd"


@pytest.mark.parametrize(
    ("names", "warnings"),
    [
        (("coordinator",), [TTL]),
        (("coordinator", "governor"), [TTL, NO_COORDINATOR]),
        (("coordinator", "chassis"), [TTL]),
    ],
)
def test_a_production_configuration_says_nothing_but_what_is_meant(names: tuple[str, ...], warnings: list[str]) -> None:
    """And each host runs one actor, on ports, a log, a folder and certificates of its own."""
    config, said_ = production(*names)
    assert said_ == warnings
    own = names[-1]
    assert config.actors == (own,)
    assert config.hosted == ((own, "identity") if own == "coordinator" else (own,)), "only coordinators have the seeds"
    assert config.identity.enabled
    assert config.state_dir == f"/var/lib/infrafabric/{own}"
    assert config.coordinator.logging.output == f"/var/log/infrafabric/{own}.log"
    assert config.coordinator.etcd.cert_file == config.nats.cert_file == f"/etc/infrafabric/certs/{own}-client.crt"
    assert config.http.cert_file == f"/etc/infrafabric/certs/{own}.crt"
    assert config.http.client_ca == "/etc/infrafabric/certs/ca.crt"
    assert all(url.startswith("https://") for url in config.coordinator.etcd.endpoints)
    assert all(url.startswith("tls://") for url in config.nats.servers)
    assert config.events.replicas == 3
    assert config.coordinator.metrics.port == {"coordinator": 9090, "governor": 9091, "chassis": 9092}[own]


def test_the_three_can_stand_on_one_machine() -> None:
    """No port is taken by two of them."""
    configs = [production(*dict.fromkeys(("coordinator", own)))[0] for own in DAEMONS]
    ports = [port for config in configs for port in {config.http.port, config.coordinator.metrics.port}]
    assert len(set(ports)) == len(ports) == 6


def test_the_runbook_is_kept() -> None:
    """Its keys have its values, where they stand there."""
    coordinator = production("coordinator")[0].coordinator
    assert coordinator.etcd.endpoints == tuple(f"https://{m}.prod.infrafabric.io:2379" for m in ETCDS)
    assert (coordinator.backend, coordinator.etcd.timeout_seconds) == ("etcd", 5)
    assert (coordinator.task_claim_ttl_seconds, coordinator.metrics.port, coordinator.metrics.path) == (
        300,
        9090,
        "/metrics",
    )
    assert (coordinator.logging.level, coordinator.logging.format) == ("INFO", "json")
    governor = production("coordinator", "governor")[0].governor
    assert governor.budget.default_session_micro_usd == 40_000_000
    assert governor.budget.cost_tracking_interval == 60
    assert (governor.capabilities.min_match_score, governor.metrics.port) == (0.7, 9091)
    assert (governor.circuit_breaker.failure_threshold, governor.circuit_breaker.reset_timeout) == (5, 60)
    chassis = production("coordinator", "chassis")[0].chassis
    runtime = chassis.runtime
    assert (runtime.engine, runtime.max_memory_mb, runtime.max_cpu_percent) == ("wasmtime", 512, 50)
    assert (runtime.max_execution_time_seconds, chassis.metrics.port) == (300, 9092)
    assert chassis.credentials.vault_addr == "https://vault.prod.infrafabric.io:8200"
    assert chassis.credentials.vault_token_path == "/etc/infrafabric/vault-token"
    assert (chassis.slo.target_latency_p95_ms, chassis.slo.target_availability_percent) == (10, 99.9)


def test_no_secret_is_in_a_file_that_is_shipped() -> None:
    """No seed, no private key, no token, no password."""
    secret = re.compile(
        r"\bS[UAO][A-Z2-7]{56}\b|-PRIVATE KEY-|AGE-SECRET-KEY|\bhvs\.|(password|(?<!cluster[-_])token|secret_key):\s*[^\s{]",
        re.IGNORECASE,
    )
    for path in [*(ROOT / "config").glob("*.yaml"), *DEPLOY.rglob("*")]:
        if path.is_file() and not {"certs", "secrets"} & set(path.relative_to(ROOT).parts) and path.name != ".env":
            assert not secret.search(path.read_text()), path


# -- compose ----------------------------------------------------------------------------------------------------------


def test_docker_compose_reads_the_whole() -> None:
    """It resolves what is included and merged, and finds nothing that it does not know; nothing is started."""
    command = [program("docker-compose"), "-f", str(COMPOSE / "compose.yaml"), "--profile", "backup"]
    text = said(*command, "config", "--format", "json", **ENVIRONMENT)
    assert json.loads(text)["services"].keys() == SERVICES.keys()


@pytest.mark.parametrize("name", ["IFABRIC_UID", "IFABRIC_OPERATORS"])
def test_docker_compose_says_what_it_was_not_told(name: str) -> None:
    """Instead of starting containers as root, or without anybody who may operate them."""
    given = {**os.environ, **ENVIRONMENT}
    del given[name]
    command = [program("docker-compose"), "-f", str(COMPOSE / "compose.yaml"), "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    assert done.returncode != 0
    assert f"required variable {name} is missing a value" in done.stderr


def mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    return [(source, target) for source, target, *_ in (volume.split(":") for volume in service.get("volumes", ()))]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_confined(name: str) -> None:
    """Pinned, not root but to give volumes away, read-only, without capabilities, limited, looked after."""
    service = SERVICES[name]
    once = service.get("network_mode") == "none"
    assert re.fullmatch(r"[\w./-]+:v?\d+(\.\d+)+(-\w+)?", service["image"]), "a tag that means one version"
    assert once or service["user"].startswith("${IFABRIC_UID")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service.get("cap_add", []) == (["CHOWN"] if once else [])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == ("on-failure" if once else "unless-stopped")
    assert service["deploy"]["resources"]["limits"].keys() == {"cpus", "memory", "pids"}
    assert not service.keys() & {"privileged", "pid", "ipc", "devices", "userns_mode"}
    if not once:
        assert service["ulimits"]["nofile"] == 65536
        assert service["healthcheck"] == {"disable": True} or service["healthcheck"]["test"][0] == "CMD"
        assert "disable" not in service["healthcheck"] or name == "backup"


def test_what_is_named_is_there() -> None:
    """Volumes, networks, secrets, services that others wait for; and every declared one is used."""
    merged = compose()
    used: dict[str, set[str]] = {"volumes": set(), "networks": set(), "secrets": set()}
    for name, service in SERVICES.items():
        used["volumes"] |= {source for source, _ in mounts(service) if not source.startswith(".")}
        used["networks"] |= set(service.get("networks", ()))
        used["secrets"] |= {s if isinstance(s, str) else s["source"] for s in service.get("secrets", ())}
        for other, how in service.get("depends_on", {}).items():
            once = SERVICES[other].get("network_mode") == "none"
            assert how["condition"] == ("service_completed_successfully" if once else "service_healthy"), (name, other)
    for section, names in used.items():
        assert names == set(merged[section]), section
    assert Counter(target for s in SERVICES.values() for _, target in mounts(s) if s.get("network_mode") != "none")


def test_every_file_that_is_mounted_is_there_or_is_made(tmp_path: Path) -> None:
    """In the repository, by `ifabric bootstrap certs`, or by an operator as the README says."""
    said(sys.executable, "-m", "ifabric", "bootstrap", "certs", str(tmp_path / "certs"))
    readme = (DEPLOY / "README.md").read_text()
    for name in ("vault-token", "grafana-admin", "secrets/alertmanager", "bootstrap nats"):
        assert name in readme
    secrets = [secret["file"] for secret in compose()["secrets"].values()]
    for source in [*(source for s in SERVICES.values() for source, _ in mounts(s) if source.startswith(".")), *secrets]:
        path = (COMPOSE / source).resolve()
        if path.parent == DEPLOY / "certs":
            assert (tmp_path / "certs" / path.name).is_file(), f"{path.name} is made by nobody"
        elif path.parent == DEPLOY / "secrets":
            assert path.name in SECRETS, path
        else:
            assert path.exists(), path


def test_no_container_sees_the_key_of_another() -> None:
    """Each key is mounted into one service."""
    keys = Counter(source for service in SERVICES.values() for source, _ in mounts(service) if source.endswith(".key"))
    assert keys and set(keys.values()) == {1}


def test_no_port_of_the_machine_is_taken_twice() -> None:
    """And etcd has none."""
    published = [
        port.rpartition(":")[0].rpartition(":")[2] for service in SERVICES.values() for port in service.get("ports", ())
    ]
    assert len(set(published)) == len(published)
    assert not any("ports" in SERVICES[member] for member in ETCDS)


def test_every_etcd_has_its_data_on_its_volume() -> None:
    """The data directory is where the volume is, each member has its own, and all know the same cluster."""
    volumes = set()
    for member in ETCDS:
        service = SERVICES[member]
        environment = service["environment"]
        source = {target: source for source, target in mounts(service)}
        volumes.add(source[environment["ETCD_DATA_DIR"]])
        assert (environment["ETCD_NAME"], service["container_name"], service["hostname"]) == (member,) * 3
        cluster = dict(part.split("=", 1) for part in environment["ETCD_INITIAL_CLUSTER"].split(","))
        assert cluster.keys() == set(ETCDS)
        assert cluster[member] == environment["ETCD_INITIAL_ADVERTISE_PEER_URLS"] == f"https://{member}:2380"
        assert environment["ETCD_ADVERTISE_CLIENT_URLS"] == f"https://{member}:2379"
        for file in ("TRUSTED_CA_FILE", "CERT_FILE", "KEY_FILE", "PEER_CERT_FILE", "PEER_KEY_FILE"):
            assert environment[f"ETCD_{file}"] in source
        assert environment["ETCD_CLIENT_CERT_AUTH"] == environment["ETCD_PEER_CLIENT_CERT_AUTH"] == "true"
        version = tuple(map(int, service["image"].rpartition(":v")[2].split(".")))
        assert version >= (3, 5, 30)
        assert set(service["networks"]) == {"etcd-peers", "store"}
    assert len(volumes) == 3
    assert {name for name, s in SERVICES.items() if "etcd-peers" in s.get("networks", ())} == set(ETCDS)


def test_the_environment_of_etcd_says_what_its_file_says() -> None:
    """The compose file and etcd.conf.yaml are the same cluster, but for names and places."""
    file = yaml.safe_load((DEPLOY / "etcd/etcd.conf.yaml").read_text())
    environment = SERVICES["etcd-1"]["environment"]
    for key in (
        "quota-backend-bytes", "auto-compaction-mode", "auto-compaction-retention", "initial-cluster-state",
        "experimental-initial-corrupt-check", "experimental-compact-hash-check-enabled", "tls-min-version",
        "listen-metrics-urls",
    ):  # fmt: skip
        assert environment["ETCD_" + key.replace("-", "_").upper()] in (str(file[key]), str(file[key]).lower()), key
    assert environment["ETCD_GRPC_KEEPALIVE_MIN_TIME"] == "1s"
    assert file["grpc-keepalive-min-time"] == 1_000_000_000


def test_every_copy_of_the_containerfile_is_there() -> None:
    """And none takes the folder with certificates and seeds along."""
    text = (COMPOSE / "Containerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not (DEPLOY / "certs").is_relative_to(ROOT / source), f"{source} has secrets below it"
    assert re.search(r"^USER \d+", text, re.MULTILINE)
    assert "livez.py" in re.search(r"^HEALTHCHECK .*$", text, re.MULTILINE)[0]  # type: ignore[index]


# -- systemd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_a_unit_is_hardened(path: Path) -> None:
    """Its exposure is at most 3.0 of 10, as systemd reckons."""
    said(program("systemd-analyze"), "security", "--offline=true", "--threshold=30", "--no-pager", str(path))


@pytest.mark.parametrize("path", [*UNITS, *TIMERS], ids=lambda p: p.name)
def test_systemd_finds_nothing_wrong_with_a_unit(path: Path, tmp_path: Path) -> None:
    """With the program that is started where it is in this checkout."""
    for other in [*UNITS, *TIMERS]:
        text = other.read_text().replace("/opt/infrafabric/venv/bin", str(Path(sys.executable).parent))
        (tmp_path / other.name).write_text(text)
    command = [program("systemd-analyze"), "verify", "--man=no", "--recursive-errors=one", str(tmp_path / path.name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_what_a_unit_starts_is_a_verb_with_its_options(path: Path) -> None:
    """Every word of the command line is one that the program knows, and its files are those of config/."""
    from ifabric.cli.app import build

    (line,) = unit(path)["Service"]["ExecStart"]
    first, *words = line.replace("%d", "/run/credentials").split()
    assert first == "/opt/infrafabric/venv/bin/ifabric"
    build(words).parse_args(words, exit_on_error=False, print_error=False)
    for word in words:
        if word.startswith("/etc/infrafabric/"):
            assert (ROOT / "config" / Path(word).name).exists()


@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemons_unit_fits_the_daemon(name: str) -> None:
    """It waits for READY, beats, drains, has the folders that its configuration names, and survives a sandbox's end."""
    service = {key: values[-1] for key, values in unit(DEPLOY / f"systemd/if-{name}.service")["Service"].items()}
    config = production(*dict.fromkeys(("coordinator", name)))[0]
    assert (service["Type"], service["NotifyAccess"], service["Restart"]) == ("notify", "main", "always")
    assert 10 <= int(service["WatchdogSec"]) <= 60
    assert int(service["TimeoutStopSec"]) > 2 * config.drain_timeout_seconds + 10
    assert service["KillMode"] == "mixed", "SIGTERM would end the sandboxes that are to be drained"
    assert config.state_dir == f"/var/lib/{service['StateDirectory']}"
    assert Path(config.coordinator.logging.output).parent == Path("/var/log") / service["LogsDirectory"]
    assert "MemoryLimit" not in service and service["MemoryMax"]
    assert "SystemCallFilter" in service and service["CapabilityBoundingSet"] == ""
    if name == "chassis":
        pool, runtime, modules = config.chassis.sandbox_pool, config.chassis.runtime, config.chassis.modules
        needed_mb = pool.max_size * runtime.max_memory_mb + modules.compile_memory_mb
        assert needed_mb < int(service["MemoryMax"].rstrip("G")) * 1024
        assert service["OOMPolicy"] == "continue", "the default stops the service when the kernel ends a sandbox"
        assert "MemoryDenyWriteExecute" not in service, "wasmtime compiles"
    else:
        assert service["RestrictNamespaces"] == service["MemoryDenyWriteExecute"] == "yes"


def test_the_timers_are_the_schedule() -> None:
    """Every five minutes, and daily at 02:00 UTC."""
    every = {path.stem: unit(path)["Timer"]["OnCalendar"] for path in TIMERS}
    assert every["if-backup"] == ["*:0/5"]
    assert every["if-backup-daily"] == ["*-*-* 02:00:00 UTC"]
    for (calendar,) in every.values():
        said(program("systemd-analyze"), "calendar", calendar)


# -- etcd, NATS, Prometheus, health -----------------------------------------------------------------------------------


async def test_etcd_starts_with_its_file(tmp_path: Path) -> None:
    """A real etcd, of one member, with the paths and addresses replaced; who has no certificate is not answered."""
    authority = Authority.create()
    authority.pair.write(tmp_path, "ca")
    for name in ("etcd-1", "etcd-1-peer"):
        authority.issue(name, HOSTS).write(tmp_path, name)
    client, peer, metrics = free_port(), free_port(), free_port()
    text = (DEPLOY / "etcd/etcd.conf.yaml").read_text().replace("@MEMBER@", "etcd-1")
    replaced = {
        r"^initial-cluster: .*$": f"initial-cluster: etcd-1=https://127.0.0.1:{peer}",
        r"etcd-1\.prod\.infrafabric\.io:2379|0\.0\.0\.0:2379": f"127.0.0.1:{client}",
        r"etcd-1\.prod\.infrafabric\.io:2380|0\.0\.0\.0:2380": f"127.0.0.1:{peer}",
        r"0\.0\.0\.0:2381": f"127.0.0.1:{metrics}",
        "/etc/etcd/certs": str(tmp_path),
        "/var/lib/etcd": str(tmp_path / "data"),
    }
    for old, new in replaced.items():
        text, count = re.subn(old, new, text, flags=re.MULTILINE)
        assert count, old
    file = tmp_path / "etcd.conf.yaml"
    file.write_text(text)

    async def healthy() -> bool:
        return b" 200 " in (await http_get(metrics, "/health"))[:20]

    with needed("etcd"):
        etcd = find_etcd()
        if etcd.version < (3, 5, 30):
            raise StartupError("an etcd of 3.5.30 or newer is needed: `just etcd`")
    server = Server(etcd, ["--config-file", str(file)], tmp_path / "etcd.log", healthy, SystemClock())
    await server.start()
    try:
        assert b"etcd_server_has_leader 1" in await http_get(metrics, "/metrics")
        with contextlib.suppress(ConnectionError):
            assert b" 200 " not in (await http_get(client, "/health"))[:20], "the client port demands a certificate"
        ctl = Path(etcd.path).with_name("etcdctl")
        shown = ["--endpoints", f"https://127.0.0.1:{client}", "--cacert", str(tmp_path / "ca.crt")]
        known = ["--cert", str(tmp_path / "etcd-1.crt"), "--key", str(tmp_path / "etcd-1.key")]
        assert "is healthy" in await asyncio.to_thread(said, str(ctl), *shown, *known, "endpoint", "health")
        stranger = [str(ctl), *shown, "--command-timeout=2s", "endpoint", "health"]
        assert (await asyncio.to_thread(subprocess.run, stranger, capture_output=True, check=False)).returncode != 0
    finally:
        await server.stop()
    log = (tmp_path / "etcd.log").read_text()
    assert "quota-backend-bytes" not in re.findall(r'"level":"error".*', log)
    assert (tmp_path / "data/member/snap/db").exists()


def test_the_nats_file_is_what_the_program_writes(tmp_path: Path) -> None:
    """The shipped one, what the generator says, and what `ifabric bootstrap nats` writes, but for keys; each is read."""
    shipped = (DEPLOY / "nats/nats.conf").read_text()
    assert shipped == nats_conf()
    said(sys.executable, "-m", "ifabric", "bootstrap", "nats", str(tmp_path / "made"))
    written = (tmp_path / "made/nats-1.conf").read_text().splitlines()[1:]
    base = [line for line in shipped.splitlines() if not line.startswith("#")]
    assert [line for line in written if not line.startswith("#")][: len(base)] == base
    with needed("nats-server"):
        nats = find_nats_server()
    authority = Authority.create()
    authority.pair.write(tmp_path, "ca")
    for number in (1, 2, 3):
        authority.issue(f"nats-{number}", HOSTS).write(tmp_path, f"nats-{number}")
    for path in [DEPLOY / "nats/nats.conf", *sorted((tmp_path / "made").glob("nats-*.conf"))]:
        local = tmp_path / path.name
        text = path.read_text().replace("/etc/infrafabric/certs", str(tmp_path))
        local.write_text(text.replace("/var/lib/nats", str(tmp_path / "data")))
        said(nats.path, "-t", "-c", str(local))


def test_nats_in_compose_finds_what_its_file_names(tmp_path: Path) -> None:
    """Certificates and data are where `ifabric bootstrap nats --certs /certs` says."""
    said(sys.executable, "-m", "ifabric", "bootstrap", "nats", str(tmp_path), "--certs", "/certs")
    for name in ("nats-1", "nats-2", "nats-3"):
        text = (tmp_path / f"{name}.conf").read_text()
        targets = {target for _, target in mounts(SERVICES[name])}
        named = re.findall(r'(?:_file|store_dir): "([^"]+)"', text)
        assert len(named) == 7 and set(named) <= targets, set(named) - targets
        assert set(re.findall(r"nats-route://([\w-]+):6222", text)) == {"nats-1", "nats-2", "nats-3"} <= SERVICES.keys()


def test_prometheus_and_alertmanager_read_their_files(tmp_path: Path) -> None:
    """And what is scraped is a service, on a network that Prometheus is on."""
    for path in ("prometheus.yml", "alertmanager.yml"):
        text = (DEPLOY / "monitoring" / path).read_text()
        (tmp_path / path).write_text(text.replace("/etc/prometheus/certs", str(tmp_path)))
    for name in ("ca.crt", "prometheus.crt", "prometheus.key"):
        (tmp_path / name).touch()
    said(program("promtool"), "check", "config", str(tmp_path / "prometheus.yml"))
    said(program("promtool"), "check", "rules", *map(str, sorted((DEPLOY / "monitoring/rules").glob("*.yml"))))
    said(program("amtool"), "check-config", str(tmp_path / "alertmanager.yml"))
    jobs = yaml.safe_load((DEPLOY / "monitoring/prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    assert targets["etcd"] == [f"{member}:2381" for member in ETCDS]
    for name in DAEMONS:
        port = production(*dict.fromkeys(("coordinator", name)))[0].coordinator.metrics.port
        assert targets[f"if-{name}"] == [f"{name}:{port}"]
    ours = set(SERVICES["prometheus"]["networks"])
    for name in (*ETCDS, *DAEMONS):
        assert ours & set(SERVICES[name]["networks"]), name


async def test_the_health_check_of_the_image_asks_the_daemon(
    tmp_path: Path, etcd: RealServer, nats: RealServer
) -> None:
    """Over TLS, with the client certificate that the daemon demands; a daemon that is frozen, or gone, is not alive."""
    authority = Authority.create()
    for name, pair in (
        ("ca", authority.pair),
        ("coordinator", authority.issue("coordinator", HOSTS, server=True)),
        ("coordinator-client", authority.issue("ifabric", client=True)),
    ):
        pair.write(tmp_path / "certs", name)
    http = {
        "cert_file": str(tmp_path / "certs/coordinator.crt"),
        "key_file": str(tmp_path / "certs/coordinator.key"),
        "client_ca": str(tmp_path / "certs/ca.crt"),
    }
    daemon = RealDaemon(tmp_path / "state", [etcd.url], [nats.url], {"actors": ["coordinator"], "http": http})
    command = [sys.executable, "-I", str(COMPOSE / "livez.py")]

    async def alive(certs: str = "certs") -> bool:
        environment = {"IFABRIC__STATE_DIR": str(tmp_path / "state"), "LIVEZ_CERTS": str(tmp_path / certs)}
        asked = await asyncio.to_thread(subprocess.run, command, env=environment, capture_output=True, check=False)
        return asked.returncode == 0

    try:
        assert not await alive(), "nothing is there"
        await daemon.start()
        assert await alive()
        authority.pair.write(tmp_path / "none", "ca")
        assert not await alive("none"), "without a certificate nobody is answered"
        daemon.freeze()
        assert not await alive()
        daemon.thaw()
        assert await alive()
    finally:
        await daemon.close()
