"""The nats-servers, and JetStream: by what a server tells everybody, by its monitoring, and by the API as we are let."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ifabric.bus.base import Bus
from ifabric.care import probes
from ifabric.care.facts import Nats, NatsServer, Peer, Stream
from ifabric.care.probes import ASK_S, words
from ifabric.clock import Clock
from ifabric.errors import FabricError, Forbidden

#: pages of the list of streams: 256 each
PAGES_MAX = 20
_LENGTH = re.compile(r"([0-9.]+)(ns|us|µs|ms|h|m|s)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


async def look(urls: tuple[str, ...], clock: Clock, bus: Callable[[], Bus], monitoring: tuple[str, ...]) -> Nats:
    """All of it. `bus` makes a connection, which is opened and closed here."""
    servers, extra = await asyncio.gather(
        asyncio.gather(*(_greeted(url) for url in urls)),
        asyncio.gather(*(_monitored(url, clock) for url in monitoring)),
    )
    told = {one.name: one for one in extra if not one.error}
    known = [_joined(server, told.pop(server.name, None)) for server in servers]
    seen = Nats(servers=(*known, *told.values(), *(one for one in extra if one.error)))
    if not any(server.jetstream for server in known):
        return seen
    connection = bus()
    try:
        async with asyncio.timeout(ASK_S * 3):
            await connection.connect()
            return await _jetstream(connection, seen, clock)
    except Forbidden as error:
        return msgspec.structs.replace(seen, hidden=error.message)
    except (FabricError, OSError, ValueError) as error:  # a TimeoutError is an OSError
        return msgspec.structs.replace(seen, jetstream_error=words(error))
    finally:
        await connection.close()


async def _greeted(url: str) -> NatsServer:
    try:
        info = await probes.greeting(url, timeout_s=ASK_S)
    except (OSError, ValueError, FabricError) as error:
        return NatsServer(url=url, error=words(error))
    return NatsServer(
        url=url,
        name=str(info.get("server_name", "")),
        version=str(info.get("version", "")),
        cluster=str(info.get("cluster", "")),
        jetstream=bool(info.get("jetstream")),
    )


async def _monitored(url: str, clock: Clock) -> NatsServer:
    """By /varz, /routez and /jsz."""
    base = url.rstrip("/")
    try:
        sent = clock.wall_ms() / 1000
        varz = probes.document(await probes.get(f"{base}/varz", clock, timeout_s=ASK_S))
        came = clock.wall_ms() / 1000
        routez = probes.document(await probes.get(f"{base}/routez", clock, timeout_s=ASK_S))
        jsz = probes.document(await probes.get(f"{base}/jsz", clock, timeout_s=ASK_S))
    except (OSError, ValueError, FabricError) as error:
        return NatsServer(url=url, error=words(error))
    meta = jsz.get("meta_cluster") or {}
    return NatsServer(
        url=url,
        name=str(varz.get("server_name", "")),
        version=str(varz.get("version", "")),
        cluster=str((varz.get("cluster") or {}).get("name", "")),
        jetstream=not jsz.get("disabled", False),
        clock=probes.offset(str(varz.get("now", "")), sent, came),
        ping_interval_s=_seconds(varz.get("ping_interval")),
        write_deadline_s=_seconds(varz.get("write_deadline")),
        slow_consumers=int(varz.get("slow_consumers", 0)),
        routed_to=len({route.get("remote_id") for route in routez.get("routes") or []}),
        meta_leader=str(meta.get("leader", "")) if meta else None,
        meta_size=int(meta.get("cluster_size", 0)) if meta else None,
    )


def _joined(server: NatsServer, told: NatsServer | None) -> NatsServer:
    if told is None or server.error:
        return server
    return msgspec.structs.replace(
        told, url=server.url, name=server.name, cluster=server.cluster, jetstream=server.jetstream
    )


async def _jetstream(bus: Bus, seen: Nats, clock: Clock) -> Nats:
    try:
        account = await _api(bus, "INFO", {})
    except Forbidden:  # a backup's credential is shown the streams, and not this
        account = {}
    streams: list[Stream] = []
    for _ in range(PAGES_MAX):
        sent = clock.wall_ms() / 1000
        page = await _api(bus, "STREAM.LIST", {"offset": len(streams)})
        came = clock.wall_ms() / 1000
        streams += (_stream(one, sent, came) for one in page.get("streams") or [])
        if not page.get("streams") or len(streams) >= int(page.get("total", 0)):
            break
    limit = int((account.get("limits") or {}).get("max_storage", -1))
    return msgspec.structs.replace(
        seen,
        stored_bytes=int(account.get("storage", 0)),
        storage_max_bytes=limit if limit > 0 else None,
        streams=tuple(streams),
    )


async def _api(bus: Bus, what: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """An answer of JetStream's API. Raises `FabricError` with what it says."""
    answer = await bus.request(f"$JS.API.{what}", msgspec.json.encode(body), timeout_s=ASK_S)
    found: dict[str, Any] = msgspec.json.decode(answer.data, type=dict)
    if (error := found.get("error")) is not None:
        raise FabricError(f"{error.get('description', 'no reason given')} ({error.get('err_code', error.get('code'))})")
    return found


def _stream(found: dict[str, Any], sent: float, came: float) -> Stream:
    cluster = found.get("cluster") or {}
    return Stream(
        name=found["config"]["name"],
        replicas=int(found["config"].get("num_replicas", 1)),
        leader=str(cluster.get("leader", "")),
        peers=tuple(
            Peer(
                name=str(peer.get("name", "")),
                current=bool(peer.get("current")),
                offline=bool(peer.get("offline")),
                lag=int(peer.get("lag", 0)),
                silent_s=int(peer.get("active", 0)) / 1e9,
            )
            for peer in cluster.get("replicas") or []
        ),
        messages=int(found["state"].get("messages", 0)),
        size_bytes=int(found["state"].get("bytes", 0)),
        clock=probes.offset(str(found.get("ts", "")), sent, came),
    )


def _seconds(told: object) -> float | None:
    """A length of Go's: nanoseconds as a number, or words like "2m0s"."""
    if isinstance(told, int | float):
        return told / 1e9
    parts = _LENGTH.findall(str(told)) if told is not None else []
    return sum(float(number) * _UNITS[unit] for number, unit in parts) if parts else None
