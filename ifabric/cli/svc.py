"""`ifabric svc ...`: the services as any NATS client discovers them (ADR-32). `nats micro ls|info|stats` does the same."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from ifabric.cli.options import Json, Where
from ifabric.cli.output import out, plain, print_json, print_table
from ifabric.errors import Unreachable

#: how long answers are waited for: nobody knows how many services there are
GATHER_S = 0.5
ANSWERS_MAX = 10_000


def ls(*, json: Json = False, where: Where | None = None) -> int:
    """List the services that answer. The same: `nats micro ls`."""
    found = _ask(where, "PING")
    if json:
        print_json(found)
    else:
        print_table(("SERVICE", "VERSION", "ID"), [(one["name"], one["version"], one["id"]) for one in found])
    return 0


def info(*, json: Json = False, where: Where | None = None) -> int:
    """Show each service's endpoints. The same: `nats micro info NAME`."""
    found = _ask(where, "INFO")
    if json:
        print_json(found)
        return 0
    for one in found:
        out.print(f"[bold]{plain(one['name'])}[/] {plain(one['version'])}  {plain(one['id'])}")
        if one.get("description"):
            out.print(f"  {plain(one['description'])}")
        rows = [(e["name"], e["subject"], e["queue_group"]) for e in one["endpoints"]]
        print_table(("ENDPOINT", "SUBJECT", "QUEUE GROUP"), rows)
    return 0


def stats(*, json: Json = False, where: Where | None = None) -> int:
    """Show each endpoint's requests, errors and mean time. The same: `nats micro stats NAME`."""
    found = _ask(where, "STATS")
    if json:
        print_json(found)
        return 0
    for one in found:
        out.print(f"[bold]{plain(one['name'])}[/] {plain(one['id'])}  since {plain(one['started'])}")
        rows = [
            (
                e["name"],
                e["num_requests"],
                e["num_errors"],
                f"{e['average_processing_time'] / 1e6:.2f} ms",
                e.get("last_error") or "",
            )
            for e in one["endpoints"]
            if e["num_requests"]
        ]
        print_table(("ENDPOINT", "REQUESTS", "ERRORS", "MEAN", "LAST ERROR"), rows)
    return 0


def _ask(where: Where | None, verb: str) -> list[dict[str, Any]]:
    """Everybody's answer to ``$SRV.<verb>``, sorted."""
    from ifabric.bus.nats import Nats
    from ifabric.client import address_of
    from ifabric.clock import SystemClock
    from ifabric.connecting import credential_of, session_of, settings_for

    async def run() -> list[dict[str, Any]]:
        at = where or Where()
        urls = address_of(at.nats, at.state_dir)
        credential = credential_of(at.credentials)
        session = session_of(None, credential) or "discovery"
        bus = Nats(settings_for(urls, session, credential, at.ca, at.timeout), SystemClock())
        await bus.connect()
        try:
            said = await bus.ask_all(f"$SRV.{verb}", b"", within_s=GATHER_S, answers_max=ANSWERS_MAX)
            answers: list[dict[str, Any]] = [msgspec.json.decode(one.data) for one in said]
            if not answers:
                raise Unreachable(f"no service answers at {urls}; is the daemon running? `ifabric run` starts one")
            return sorted(answers, key=lambda one: (one["name"], one["id"]))
        finally:
            await bus.close()

    return asyncio.run(run())
