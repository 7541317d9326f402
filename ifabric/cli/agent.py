"""`ifabric agent create|list|rotate|revoke`: who may speak to the fabric, and as whom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from ifabric.cli.connect import with_client
from ifabric.cli.options import Json, Where
from ifabric.cli.output import out, plain, print_json, print_table
from ifabric.errors import CallerError, ConfigError
from ifabric.wire.permissions import ROLES, Role, permissions
from ifabric.wire.subjects import SESSION

if TYPE_CHECKING:
    from ifabric.client import Client
    from ifabric.wire.identity import AgentReply

Name = Annotated[str, Parameter(help="The agent's name, which is its session: letters, digits, _ -.")]
Out = Annotated[Path | None, Parameter(name="--out", help="Where the credential is written. Default: NAME.nk.")]
Roles = Annotated[Role, Parameter(help="; ".join(f"{name}: {says}" for name, says in ROLES.items()))]


def create(
    name: Name,
    *,
    role: Roles = "agent",
    account: Annotated[str | None, Parameter(help="Whose money it spends, as acme/research.")] = None,
    capabilities: Annotated[
        tuple[str, ...], Parameter(help="What it may call its capabilities. Default: anything.", consume_multiple=True)
    ] = (),
    note: Annotated[str, Parameter(help="A word about it; it is kept.")] = "",
    file: Out = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Make a credential: a key pair whose private half is written to a file here,
    and whose public half the fabric lets in from now on.

    NATS allows it its own subjects, its own inbox and the public events, and
    nothing else. The file is all that the agent needs; `nats --nkey FILE` takes it
    as well.

    For example:

        ifabric agent create alice --account acme/research --capabilities rust wasm
        IFABRIC_CREDENTIALS=alice.nk python worker.py
        ifabric agent create ann --role operator
    """
    from ifabric import credentials
    from ifabric.wire.identity import CreateAgent

    path = _free(name, file)
    made = credentials.make(name)
    message = CreateAgent(
        agent=name,
        public_key=made.public_key,
        role=role,
        account=account,
        capabilities=capabilities or None,
        note=note,
    )
    made.write(path, f"Whoever has this file is {name} ({role}).")
    reply = _or_take_away(path, where, message)
    if json:
        print_json({"file": str(path), **_plain(reply)})
        return 0
    out.print(f"[green]✔[/] {plain(name)} is let in from now on; the credential is in [bold]{plain(path)}[/]")
    _tell_use(name, path, where)
    return 0


def list_(*, json: Json = False, where: Where | None = None) -> int:
    """List who may connect, and who was revoked.

    For example:

        ifabric agent list
        ifabric agent list --json | jq -r '.[] | select(.role == "operator").agent'
    """
    from ifabric.wire.identity import ListAgents

    async def all_of(client: Client) -> list[AgentReply]:
        found: list[AgentReply] = []
        after: str | None = ""
        while after is not None:
            page = await client.call(ListAgents(after=after, limit=1000))
            found += page.agents
            after = page.after
        return found

    agents = with_client(where, None, all_of)
    if json:
        print_json(agents)
        return 0
    rows = [
        (
            one.agent,
            one.role,
            Text(one.state, style="green" if one.state == "active" else "red"),
            one.account or "",
            "anything" if one.capabilities is None else ", ".join(one.capabilities),
            one.at[:16].replace("T", " "),
            one.by,
            one.note if one.former_until is None else f"former key until {one.former_until}",
        )
        for one in agents
    ]
    print_table(("AGENT", "ROLE", "STATE", "ACCOUNT", "CAPABILITIES", "SINCE", "BY", "NOTE"), rows)
    if not rows:
        out.print("[dim]nobody yet: `ifabric agent create NAME`[/]")
    return 0


def rotate(
    name: Name,
    *,
    grace: Annotated[
        int, Parameter(help="Seconds for which the former key is let in as well.", validator=Number(gte=0, lte=604_800))
    ] = 0,
    file: Out = None,
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Give an agent a new key. Its connections with the former one are ended, at once
    or after --grace. One that was revoked is let in again.

    For example:

        ifabric agent rotate alice --grace 3600 --out alice-2.nk
    """
    from ifabric import credentials
    from ifabric.wire.identity import RotateAgent

    path = _free(name, file)
    made = credentials.make(name)
    made.write(path, f"Whoever has this file is {name}.")
    reply = _or_take_away(path, where, RotateAgent(agent=name, public_key=made.public_key, grace_s=grace))
    if json:
        print_json({"file": str(path), **_plain(reply)})
        return 0
    until = f"; the former key is let in until {reply.former_until}" if reply.former_until else ""
    out.print(f"[green]✔[/] {plain(name)} has a new key, in [bold]{plain(path)}[/]{until}")
    return 0


def revoke(
    name: Name,
    *,
    why: Annotated[str, Parameter(help="Why, in words; it is kept.")] = "",
    json: Json = False,
    where: Where | None = None,
) -> int:
    """Let an agent in no more, and end its connections. What it holds comes back when
    its session ends.

    For example:

        ifabric agent revoke alice --why "the laptop was stolen"
    """
    from ifabric.wire.identity import RevokeAgent

    reply = with_client(where, None, lambda c: c.call(RevokeAgent(agent=name, why=why)))
    if json:
        print_json(reply)
    else:
        out.print(f"[green]✔[/] {plain(name)} is let in no more, and what was connected is not any more")
    return 0


def _free(name: str, file: Path | None) -> Path:
    """Where the credential goes. `ConfigError` before anything is made."""
    if not SESSION.fullmatch(name):
        raise ConfigError(f"{name!r} is no name: it must match {SESSION.pattern}")
    path = file or Path(f"{name}.nk")
    if path.exists():
        raise ConfigError(f"{path} is there already; nothing was done. Name another with --out, or move it away.")
    return path


def _or_take_away(path: Path, where: Where | None, message: Any) -> AgentReply:
    """What the fabric says. A credential that it surely did not accept is not left lying about."""
    try:
        reply: AgentReply = with_client(where, None, lambda c: c.call(message))
    except CallerError:
        path.unlink()
        raise
    return reply


def _tell_use(name: str, path: Path, where: Where | None) -> None:
    nats = (where or Where()).nats
    servers = f" IFABRIC_NATS={nats}" if nats else ""
    out.print(
        f"[dim]  its session is {plain(name)}: IFABRIC_CREDENTIALS={plain(path)}{plain(servers)} ifabric task next[/]"
    )


def _plain(reply: AgentReply) -> dict[str, Any]:
    import msgspec

    found: dict[str, Any] = msgspec.to_builtins(reply)
    return found


def users(agents: list[AgentReply], components: tuple[str, ...]) -> dict[str, Any]:
    """Those that are active as users of a static nats.conf: public key -> what it may say."""
    return {one.public_key: permissions(one.role, one.agent, components) for one in agents if one.state == "active"}
