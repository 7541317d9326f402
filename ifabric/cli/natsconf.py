"""`ifabric bootstrap nats`: the keys that identities need, and a nats.conf that asks for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ifabric import credentials
from ifabric.bus.serverconf import Identities, Routes, ServerConf, Tls
from ifabric.cli.options import Json
from ifabric.cli.output import out, plain, print_json
from ifabric.credentials import Credential
from ifabric.errors import ConfigError
from ifabric.wire.permissions import Permissions, permissions
from ifabric.wire.subjects import RESERVED_SESSIONS, SESSION

#: the files that are written, and what each is
KEYS = {
    "issuer": "signs what the auth callout is answered; for daemons only",
    "system": "the daemons' user in NATS's system account",
    "daemon": "the daemons' user in the account of the agents",
}


def nats(
    folder: Annotated[Path, Parameter(help="Where the files go; it is made.")],
    *,
    operator: Annotated[str, Parameter(help="The first operator's name.")] = "operator",
    page_operators: Annotated[
        tuple[str, ...],
        Parameter(
            name="--page-operator",
            help="Who may act from the live page (page.operators): default, the first operator.",
            consume_multiple=True,
        ),
    ] = (),
    servers: Annotated[
        tuple[str, ...], Parameter(name="--server", help="Names of the cluster's servers.", consume_multiple=True)
    ] = ("nats-1", "nats-2", "nats-3"),
    account: Annotated[str, Parameter(help="The NATS account that agents and daemons share.")] = "FABRIC",
    certs: Annotated[str, Parameter(help="Where the servers find their certificates: NAME.crt, NAME.key, ca.crt.")] = (
        "/etc/infrafabric/certs"
    ),
    tls: Annotated[
        bool, Parameter(help="Certificates are demanded nowhere and shown everywhere.", negative="--no-tls")
    ] = True,
    static_agents: Annotated[
        Path | None,
        Parameter(help="`ifabric agent list --json` in a file: write these as static users, and no auth callout."),
    ] = None,
    json: Json = False,
) -> int:
    """Make the keys for identities on NATS and a configuration for each server, and
    print what belongs into the daemon's. Keys that are there are kept.

    With them, a NATS server asks a daemon who a connection is (its auth callout),
    and `ifabric agent create` and `revoke` take effect at once. Whoever prefers
    users in nats.conf gives --static-agents, and reloads the servers after each
    change.

    For example:

        ifabric bootstrap nats ./nats --operator ann
        ifabric bootstrap nats ./nats --server nats-1 --no-tls
        ifabric agent list --json > agents.json && ifabric bootstrap nats ./nats --static-agents agents.json
    """
    for name in (operator, *page_operators):
        if not SESSION.fullmatch(name) or name in RESERVED_SESSIONS:
            raise ConfigError(
                f"{name!r} is no name: it must match {SESSION.pattern}, and not be one of the fabric's own"
            )
    if not servers or len(set(servers)) != len(servers):
        raise ConfigError("--server: name each server once")
    keys = {name: _kept(folder / f"{name}.nk", "", about) for name, about in KEYS.items()}
    first = _kept(folder / f"{operator}.nk", operator, f"Whoever has this file is {operator} (operator).")
    identities = Identities(
        issuer=keys["issuer"].public_key,
        daemon=keys["daemon"].public_key,
        system=keys["system"].public_key,
        account=account,
        static=_static(static_agents, operator, first.public_key),
        page_operators=page_operators or (operator,),
    )
    written = [_write_conf(folder, name, servers, certs if tls else None, identities) for name in servers]
    daemon = _for_the_daemon(folder, operator, first, account)
    (folder / "ifabric-identity.yaml").write_text(daemon)
    if json:
        made = [*(f"{name}.nk" for name in (*KEYS, operator)), *written, "ifabric-identity.yaml"]
        print_json({"folder": str(folder), "files": made, "operator": {operator: first.public_key}})
        return 0
    for name, about in KEYS.items():
        out.print(f"[green]✔[/] {plain(folder / f'{name}.nk')}  [dim]{about}[/]")
    out.print(f"[green]✔[/] {plain(folder / f'{operator}.nk')}  [dim]the first operator's credential[/]")
    for name in written:
        out.print(f"[green]✔[/] {plain(folder / name)}  [dim]`nats-server -c {name}`[/]")
    out.print("\n[bold]For the daemons[/] (ifabric-identity.yaml: one more --config):\n")
    out.print(plain_lines(daemon))
    out.print(f"[dim]Then: IFABRIC_CREDENTIALS={plain(folder / f'{operator}.nk')} ifabric agent create NAME[/]")
    return 0


def plain_lines(text: str) -> str:
    """A text of several lines, shown as it is."""
    return "\n".join(plain(line) for line in text.splitlines())


def _kept(path: Path, session: str, about: str) -> Credential:
    """The key of a file; one that is not there is made."""
    if path.exists():
        return credentials.read(path)
    made = credentials.make(session, "account" if path.stem == "issuer" else "user")
    made.write(path, about)
    return made


def _write_conf(folder: Path, name: str, servers: tuple[str, ...], certs: str | None, identities: Identities) -> str:
    tls = None
    if certs is not None:
        tls = Tls(cert_file=f"{certs}/{name}.crt", key_file=f"{certs}/{name}.key", ca_file=f"{certs}/ca.crt")
    conf = ServerConf(
        name=name,
        listen="0.0.0.0:4222",
        store_dir="/var/lib/nats",
        monitoring="127.0.0.1:8222",
        tls=tls,
        routes=None
        if len(servers) == 1
        else Routes(
            cluster="ifabric",
            listen="0.0.0.0:6222",
            routes=[f"nats-route://{other}:6222" for other in servers],
            tls=None if tls is None else replace(tls, verify=True),
        ),
        identities=identities,
        header="written by `ifabric bootstrap nats`",
    )
    path = folder / f"{name}.conf"
    path.write_text(conf.text())
    return path.name


def _static(path: Path | None, operator: str, key: str) -> dict[str, Permissions] | None:
    if path is None:
        return None
    import msgspec

    from ifabric.cli.agent import users
    from ifabric.config_ops import Identity
    from ifabric.wire.identity import AgentReply

    try:
        agents = msgspec.json.decode(path.read_bytes(), type=list[AgentReply])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path} is not what `ifabric agent list --json` prints: {error}") from None
    components = Identity().components
    return {key: permissions("operator", operator, components), **users(agents, components)}


def _for_the_daemon(folder: Path, operator: str, first: Credential, account: str) -> str:
    at = folder.resolve()
    return f"""\
nats:
  nkey_seed_file: {at / "daemon.nk"}
identity:
  enabled: true
  issuer_seed_file: {at / "issuer.nk"}
  system_seed_file: {at / "system.nk"}
  account: {account}
  operators:
    {operator}: {first.public_key}
"""
