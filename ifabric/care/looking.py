"""Collects the facts: every source at once, each within its own time, and none hides another.

**Clocks** are compared without a shell on the other machine: by the `Date` of etcd's HTTP answers, which is cut to whole
seconds, by the `now` of NATS's monitoring and by the `ts` of a stream's leader, which are exact. All lie within the time
that the answer took. So an offset is an interval, and only what is surely off is called off.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from ifabric import __version__, pki
from ifabric.backup.places import Folder
from ifabric.bus.base import Bus
from ifabric.care import nats_servers, probes
from ifabric.care.cluster import Cluster
from ifabric.care.counted import counted
from ifabric.care.facts import (
    Backups,
    Breaker,
    Certificate,
    Counted,
    Daemon,
    Etcd,
    Facts,
    Missed,
    Nats,
    Unmatched,
    Vault,
)
from ifabric.care.places import Places
from ifabric.care.probes import ASK_S, words
from ifabric.clock import Clock
from ifabric.errors import ConfigError, FabricError
from ifabric.wire import subjects
from ifabric.wire.governor import BreakersReply, MatchEvent

#: a whole source
SOURCE_S = 10.0
#: between two looks at what a daemon counts: what grows within it is what happens now
COUNT_S = 2.0
T = TypeVar("T")


async def look(places: Places, clock: Clock, bus: Callable[[], Bus], *, monitoring: tuple[str, ...] = ()) -> Facts:
    """The facts. `bus` makes a connection to NATS, which is opened and closed here; `monitoring` are URLs of
    nats-servers' HTTP ports.
    """
    missed: list[Missed] = []

    async def within(part: str, source: Awaitable[T]) -> T | None:
        try:
            async with asyncio.timeout(SOURCE_S):
                return await source
        except TimeoutError:
            missed.append(Missed(part=part, why=f"it took longer than {SOURCE_S:g} s"))
        except (FabricError, OSError, ValueError) as error:
            missed.append(Missed(part=part, why=str(error)))
        return None

    etcd, nats, certificates, vaults, daemon, (unmatched, backups) = await asyncio.gather(
        within("etcd", _etcd(places, clock)),
        within("NATS", _nats(places, clock, bus, monitoring)),
        within("certificates", _certificates(places)),
        within("Vault", _vaults(places, clock)),
        within("daemon", _daemon(places, clock)),
        asyncio.gather(
            within("NATS", _unmatched(places, bus)),
            within("backups", asyncio.to_thread(_backups, places, clock.wall_ms() / 1000)),
        ),
    )
    return Facts(
        version=__version__,
        etcd=etcd,
        nats=nats,
        certificates=certificates or (),
        vaults=vaults or (),
        daemon=daemon,
        unmatched=unmatched,
        backups=backups,
        smells=places.smells,
        missed=tuple(missed),
        embedded=places.embedded,
        allow_old_etcd=places.config.coordinator.etcd.allow_old_etcd,
        words=places.words,
        monitored=bool(monitoring),
    )


async def _etcd(places: Places, clock: Clock) -> Etcd | None:
    if not places.etcd.endpoints:
        return None
    async with Cluster(places.etcd, clock) as cluster:
        return await cluster.look()


async def _nats(places: Places, clock: Clock, bus: Callable[[], Bus], monitoring: tuple[str, ...]) -> Nats | None:
    return await nats_servers.look(places.nats, clock, bus, monitoring) if places.nats else None


# -- certificates, Vault, the daemon, backups ---------------------------------------------------------------------------


async def _certificates(places: Places) -> tuple[Certificate, ...]:
    config, now = places.config, dt.datetime.now(dt.UTC)
    nats, http = config.nats, config.http
    files = {
        "coordinator.etcd.ca_cert": (places.etcd.ca_cert, None),
        "coordinator.etcd.cert_file": (places.etcd.cert_file, places.etcd.key_file),
        "nats.ca_cert": (nats.ca_cert, None),
        "nats.cert_file": (nats.cert_file, nats.key_file),
        "http.cert_file": (http.cert_file, http.key_file),
        "http.client_ca": (http.client_ca, None),
        "vault.ca_cert": (config.vault.ca_cert, None),
        "chassis.credentials.ca_cert": (config.chassis.credentials.ca_cert, None),
    }
    found = [_in_file(key, path, private, now) for key, (path, private) in files.items() if path is not None]
    seen = {one.where.partition(" ")[2]: one for one in found}  # one file under two keys is one certificate
    urls = [url for url in (*places.etcd.endpoints, *places.nats, places.daemon) if url]
    shown = await asyncio.gather(*(_shown(url, now) for url in urls))
    return (*seen.values(), *(one for one in shown if one is not None))


def _in_file(key: str, path: str, private: str | None, now: dt.datetime) -> Certificate:
    where = f"{key} {path}"
    try:
        found = pki.facts(Path(path).read_bytes())
        is_open = private is not None and bool(Path(private).stat().st_mode & 0o077)
    except OSError as error:
        return Certificate(where=where, error=f"cannot be read: {error.strerror}")
    except ValueError:
        return Certificate(where=where, error="is no certificate in PEM")
    return _certificate(where, found, now, key_is_open=is_open)


async def _shown(url: str, now: dt.datetime) -> Certificate | None:
    """What the server at a URL presents; None when it speaks without TLS, or does not answer: others say that."""
    try:
        shown = await probes.presented(url, timeout_s=ASK_S)
    except (OSError, ValueError, ConfigError):
        return None
    return None if shown is None else _certificate(f"{url} presents", pki.facts_of(shown), now)


def _certificate(where: str, found: pki.Facts, now: dt.datetime, *, key_is_open: bool = False) -> Certificate:
    return Certificate(
        where=where,
        name=found.common_name,
        days_left=found.days_left(now),
        days_to_begin=(found.not_before - now).total_seconds() / 86_400,
        key_is_open=key_is_open,
    )


async def _vaults(places: Places, clock: Clock) -> tuple[Vault, ...]:
    config = places.config
    secrets, sandboxes = config.vault, config.chassis.credentials
    asked = []
    if secrets.addr is not None:
        asked.append(_vault("vault.addr", secrets.addr, secrets.token_path, secrets.ca_cert, secrets.namespace, clock))
    if sandboxes.vault_addr is not None:
        asked.append(
            _vault(
                "chassis.credentials.vault_addr",
                sandboxes.vault_addr,
                sandboxes.vault_token_path,
                sandboxes.ca_cert,
                sandboxes.vault_namespace,
                clock,
            )
        )
    return tuple(await asyncio.gather(*asked))


async def _vault(
    where: str, addr: str, token_path: str | None, ca_cert: str | None, namespace: str | None, clock: Clock
) -> Vault:
    base = f"{addr.rstrip('/')}/v1"
    found = Vault(where=where, address=addr)
    try:
        tls = probes.trusting(ca_cert) if addr.startswith("https") else None
        health = await probes.get(f"{base}/sys/health", clock, timeout_s=ASK_S, tls=tls)
        found = msgspec.structs.replace(found, status=health.status)
        if token_path is None or health.status in (501, 503):
            return found
        token = (await asyncio.to_thread(Path(token_path).read_text)).strip()
        headers = {"X-Vault-Token": token, "X-Vault-Request": "true"}
        if namespace is not None:
            headers["X-Vault-Namespace"] = namespace
        own = await probes.get(f"{base}/auth/token/lookup-self", clock, timeout_s=ASK_S, tls=tls, headers=headers)
    except (OSError, ValueError, ConfigError) as error:
        if found.status is None:
            return msgspec.structs.replace(found, error=words(error))
        return msgspec.structs.replace(found, token_error=words(error))
    if own.status != 200:
        return msgspec.structs.replace(found, token_error=f"Vault answers {own.status}")
    return msgspec.structs.replace(found, token_ttl_s=float((probes.document(own).get("data") or {}).get("ttl", 0)))


async def _daemon(places: Places, clock: Clock) -> Daemon | None:
    if places.daemon is None:
        return None
    url = places.daemon
    try:
        # this machine's own, told by a file of ours: its certificate is looked at elsewhere
        tls = probes.unverified() if url.startswith("https") else None
        answer = await probes.get(f"{url}/health", clock, timeout_s=ASK_S, tls=tls)
        said = probes.document(answer)
    except (OSError, ValueError) as error:
        return Daemon(url=url, error=words(error))
    return Daemon(
        url=url,
        status=str(said.get("status", "")),
        version=str(said.get("version", "")),
        loop_lag_s=float(said.get("loop_lag_s", 0.0)),
        not_ready=tuple(map(str, said.get("not_ready") or ())),
        warnings=tuple(map(str, said.get("warnings") or ())),
        counted=await _counted(url, clock, tls),
        breakers=await _breakers(url, clock, tls, places),
    )


async def _counted(url: str, clock: Clock, tls: ssl.SSLContext | None) -> Counted | None:
    """What it counts, and what grew within two seconds; None when it does not say so on this port."""
    try:
        before = await probes.get(f"{url}/metrics", clock, timeout_s=ASK_S, tls=tls)
        if before.status != 200:
            return None
        await clock.sleep(COUNT_S)
        after = await probes.get(f"{url}/metrics", clock, timeout_s=ASK_S, tls=tls)
    except (OSError, ValueError):
        return None
    return counted(before.body.decode(errors="replace"), after.body.decode(errors="replace"))


async def _breakers(url: str, clock: Clock, tls: ssl.SSLContext | None, places: Places) -> tuple[Breaker, ...] | None:
    """Those that are not closed, as its page has them; None when the page is off, or not shown to us."""
    headers = {}
    try:
        if (file := places.config.page.viewer_token_file) is not None:
            token = (await asyncio.to_thread(Path(file).read_text)).splitlines()
            headers["Authorization"] = f"Bearer {token[0].strip() if token else ''}"
        answer = await probes.get(f"{url}/api/breakers", clock, timeout_s=ASK_S, tls=tls, headers=headers)
        if answer.status != 200:
            return None
        lines = msgspec.json.decode(answer.body, type=BreakersReply).breakers
    except (OSError, ValueError):  # of msgspec's and of Unicode's too
        return None
    return tuple(
        Breaker(
            name=line.breaker,
            state=line.state,
            opened_ago_s=line.opened_ago_s,
            probe_in_s=line.probe_in_s,
            by=line.by,
            why=line.why,
        )
        for line in lines
        if line.state != "closed"
    )


async def _unmatched(places: Places, bus: Callable[[], Bus]) -> Unmatched | None:
    """The last that the journal tells of tasks that nobody can take; None when it cannot be read, which others say."""
    if not places.nats:
        return None
    connection = bus()
    try:
        async with asyncio.timeout(ASK_S):
            await connection.connect()
            journal = await connection.journal(subjects.EVENT_STREAM)
            last = await journal.last(subjects.event("match", "unmatched"))
            told = msgspec.json.decode(last.data, type=MatchEvent) if last is not None else None
    except (FabricError, OSError, ValueError):  # a TimeoutError is an OSError
        return None
    finally:
        await connection.close()
    return Unmatched(needs=told.needs, missing=told.missing, example=told.example) if told is not None else None


def _backups(places: Places, now: float) -> Backups:
    config = places.config.backup
    folder = Path(config.directory) if config.directory else places.state_dir / "backups"
    found = Backups(folder=str(folder), wanted=bool(config.recipients), interval_s=config.interval_seconds)
    if not found.wanted:
        return found
    try:
        there = Folder(folder).backups()
    except FabricError as error:
        return msgspec.structs.replace(found, error=error.message)
    broken = tuple(one.path.name for one in there if not one.whole)
    whole = [one for one in there if one.whole]
    if not whole:
        return msgspec.structs.replace(found, broken=broken)
    newest = whole[-1]
    age_s = max(0.0, now - newest.at.timestamp())
    return msgspec.structs.replace(found, broken=broken, newest=newest.path.name, newest_age_s=age_s)
