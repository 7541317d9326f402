"""Turns etcd's access control on, and tries it: what `ifabric.care.roles` states, carried out.

**The way back.** From the moment it is enabled, etcd answers only to whom it knows, and whether it takes the common
name of a certificate (`--client-cert-auth`) it cannot be asked before. So for that moment there is one more
administrator, with a password that only this process knows. If our certificate turns out to be nobody, that one
disables access control again; in either case it is deleted. One that was left by a process which died in between is
deleted by the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import grpc
from aetcd import rpc

from ifabric.care.roles import ROOT, Attempt, Found, Step, User, attempts, end_of
from ifabric.clock import Clock
from ifabric.errors import ConfigError, FabricError, Forbidden, StartupError, Unreachable
from ifabric.store.base import Compare, Op, Put, Target, Txn
from ifabric.store.channel import EtcdSettings, forbidden, open_line, user_of
from ifabric.store.encoding import encode_txn

#: the administrator of the moment in which access control is enabled
RESCUER = "ifabric-bootstrap"
_NOT_ROOT = ("permission denied", "user name not found", "user not found", "user name is empty", "invalid auth token")
_REQUESTS = {
    "RoleAdd": rpc.AuthRoleAddRequest,
    "RoleGrantPermission": rpc.AuthRoleGrantPermissionRequest,
    "RoleRevokePermission": rpc.AuthRoleRevokePermissionRequest,
    "UserAdd": rpc.AuthUserAddRequest,
    "UserChangePassword": rpc.AuthUserChangePasswordRequest,
    "UserDelete": rpc.AuthUserDeleteRequest,
    "UserGrantRole": rpc.AuthUserGrantRoleRequest,
    "UserRevokeRole": rpc.AuthUserRevokeRoleRequest,
    "UserList": rpc.AuthUserListRequest,
    "UserGet": rpc.AuthUserGetRequest,
    "RoleList": rpc.AuthRoleListRequest,
    "RoleGet": rpc.AuthRoleGetRequest,
    "AuthStatus": rpc.AuthStatusRequest,
    "AuthEnable": rpc.AuthEnableRequest,
    "AuthDisable": rpc.AuthDisableRequest,
    "Authenticate": rpc.AuthenticateRequest,
}


class Tried(NamedTuple):
    """An attempt and what became of it. `said`: etcd's words when it was refused."""

    user: str
    attempt: Attempt
    allowed: bool
    said: str = ""

    @property
    def as_stated(self) -> bool:
        """Whether etcd did as `ifabric.care.roles` states."""
        return self.allowed == self.attempt.allowed


class Line:
    """One user's connection to the first member that answers."""

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self.user = user_of(settings)
        self._channel: grpc.aio.Channel | None = None
        self.endpoint = ""

    async def __aenter__(self) -> Self:
        why = []
        for endpoint in self._settings.endpoints:
            self._channel, self.endpoint = open_line(endpoint, self._settings), endpoint
            try:
                await rpc.ClusterStub(self._channel).MemberList(
                    rpc.MemberListRequest(), timeout=self._settings.timeout_s
                )
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    await self._channel.close()
                    why.append(f"{endpoint}: {(error.details() or '')[:200]}")
                    continue
            return self
        raise Unreachable(f"no etcd answers: {'; '.join(why)}")

    async def __aexit__(self, *_: object) -> None:
        if self._channel is not None:
            await self._channel.close()

    @property
    def channel(self) -> grpc.aio.Channel:
        """Between enter and exit."""
        assert self._channel is not None, "the line is open"
        return self._channel

    async def auth(self, method: str, *, token: str | None = None, **fields: Any) -> Any:
        """A call of etcd's `Auth`. `Forbidden` when we are not root, `FabricError` for the rest."""
        call = getattr(rpc.AuthStub(self.channel), method)
        metadata = (("token", token),) if token else ()
        try:
            return await call(_REQUESTS[method](**fields), timeout=self._settings.timeout_s, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            details = error.details() or ""
            if any(sign in details for sign in _NOT_ROOT):
                raise forbidden(self.user, details) from None
            raise FabricError(f"etcd at {self.endpoint} did not do {method}: {details}") from None


def refuse(settings: EtcdSettings) -> None:
    """`ConfigError` for what cannot work: names come from certificates, and etcd's administrator is called root."""
    plain = [endpoint for endpoint in settings.endpoints if not endpoint.startswith("https://")]
    if not settings.endpoints:
        raise ConfigError("no etcd is named: give --endpoints, or coordinator.etcd.endpoints in a configuration")
    if plain:
        raise ConfigError(
            f"{', '.join(plain)}: without TLS nobody has a certificate to be known by; nothing was changed. Serve etcd on https, "
            "with --client-cert-auth"
        )
    user = user_of(settings)
    if user != ROOT:
        whose = f"is for {user}" if user else "has no common name, or there is none"
        raise ConfigError(
            f"the certificate {settings.cert_file} {whose}; etcd's administrator is the one for root. Nothing was changed. "
            "`ifabric bootstrap certs` makes root.crt and root.key"
        )


async def look(line: Line) -> Found:
    """What is there. `Forbidden`, with the way out, when access control is on and our certificate is nobody there."""
    try:
        enabled = (await line.auth("AuthStatus")).enabled
        users = (await line.auth("UserList")).users
        roles = (await line.auth("RoleList")).roles
    except Forbidden as error:
        raise Forbidden(
            f"access control is on in etcd at {line.endpoint}, and the name in our certificate is not taken for its administrator: "
            f"{error.message}. Start its members with --client-cert-auth, or let whoever turned it on turn it off",
            what="etcd",
        ) from None
    found_users = {name: frozenset((await line.auth("UserGet", name=name)).roles) for name in users}
    found_roles = {}
    for role in roles:
        permissions = (await line.auth("RoleGet", role=role)).perm
        found_roles[role] = frozenset((p.permType, p.key, p.range_end) for p in permissions)
    return Found(bool(enabled), found_users, found_roles)


async def carry_out(line: Line, steps: Sequence[Step]) -> None:
    """Step by step. What was done before a failure stays: the next run goes on from there."""
    for step in steps:
        await line.auth(step.method, **step.fields)


async def enable(line: Line, clock: Clock) -> None:
    """Turns access control on. `StartupError`: etcd does not take the names of certificates, and it is off again."""
    password = clock.token()
    await _forget_rescuer(line)
    await line.auth("UserAdd", name=RESCUER, password=password)
    try:
        await line.auth("UserGrantRole", user=RESCUER, role=ROOT)
        await line.auth("AuthEnable")
        try:
            await line.auth("UserList")
        except Forbidden as error:
            token = (await line.auth("Authenticate", name=RESCUER, password=password)).token
            await line.auth("AuthDisable", token=token)
            raise StartupError(
                f"etcd at {line.endpoint} does not take the name in a certificate for the user ({error.message}): start its members "
                "with --client-cert-auth. Access control was turned off again; users and roles are there"
            ) from None
    finally:
        await _forget_rescuer(line)


async def _forget_rescuer(line: Line) -> None:
    if RESCUER in (await line.auth("UserList")).users:
        await line.auth("UserDelete", name=RESCUER)


# -- trying it ---------------------------------------------------------------------------------------------------------


async def try_as(user: User, settings: EtcdSettings, certificate: Path, key: Path) -> list[Tried]:
    """Everything that `attempts` names, as this user. `Unreachable` when no member takes the certificate."""
    theirs = replace(settings, cert_file=str(certificate), key_file=str(key))
    made = []
    async with Line(theirs) as line:
        for attempt in attempts(user):
            try:
                await _try(line.channel, attempt, settings.timeout_s)
            except grpc.aio.AioRpcError as error:
                said = error.details() or error.code().name
                if not any(sign in said for sign in _NOT_ROOT):
                    raise FabricError(f"trying to {attempt.kind} as {user.name}: etcd says {said}") from None
                made.append(Tried(user.name, attempt, allowed=False, said=said))
            else:
                made.append(Tried(user.name, attempt, allowed=True))
    return made


async def _try(channel: grpc.aio.Channel, attempt: Attempt, timeout_s: float) -> None:
    """Does nothing that stays; raises what gRPC raises when it is refused."""
    prefix = attempt.prefix
    txn: Any = channel.unary_unary(
        "/etcdserverpb.KV/Txn", request_serializer=bytes, response_deserializer=rpc.TxnResponse.FromString
    )
    match attempt.kind:
        case "read":
            asked = rpc.RangeRequest(key=prefix, range_end=end_of(prefix), count_only=True)
            await rpc.KVStub(channel).Range(asked, timeout=timeout_s)
        case "write":
            await txn(encode_txn(Txn((_never(prefix),), (Put(prefix, b""),))), timeout=timeout_s)
        case "nested":
            inner = Txn((_never(b"fabric/"),), (Put(prefix, b""),))
            await txn(encode_txn(Txn((), (inner,))), timeout=timeout_s)
        case "admin":
            await rpc.AuthStub(channel).UserList(rpc.AuthUserListRequest(), timeout=timeout_s)
        case "snapshot":
            call = rpc.MaintenanceStub(channel).Snapshot(rpc.SnapshotRequest(), timeout=timeout_s)
            await call.read()
            call.cancel()


def _never(key: bytes) -> Compare:
    """What no key fulfils: access control looks at what stands behind it, and it is not done."""
    return Compare(key, Target.VERSION, Op.GREATER, 1 << 40)
