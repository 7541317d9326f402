"""Access control in a real etcd of three: who may do what, and that a daemon does its work as a user with a role."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import wasmtime
from aetcd import rpc

import ifabric
from ifabric.care.certificates import FILES, make, wanted
from ifabric.care.etcd_auth import RESCUER, Line, look
from ifabric.care.roles import PREFIXES, READ, ROLES, ROOT, USERS, Found, end_of, plan
from ifabric.client import Client
from ifabric.errors import FabricError, Forbidden
from ifabric.store.base import Compare, Delete, Get, Op, Put, Target, Txn, prefix_end
from ifabric.store.channel import EtcdSettings, open_channel
from ifabric.store.etcd import Etcd, translate
from ifabric.store.session import Session
from ifabric.testing.clusters import Certificates, Members, etcd_cluster
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects
from tests.conftest import needed
from tests.system.conftest import CLOCK, eventually

#: clusters with TLS, and hundreds of attempts
pytestmark = pytest.mark.slow

ROOT_FOLDER = Path(__file__).parent.parent.parent
EVERYBODY = "icobs"
#: the letters of the tables below
NAMES = {"i": "ifabric", "c": "ifabric-chassis", "o": "observer", "b": "backup", "s": "stranger"}


class Guarded:
    """An etcd of three with TLS, and the certificates to it."""

    def __init__(self, certificates: Certificates, etcd: Members) -> None:
        self.certificates, self.etcd = certificates, etcd
        make(certificates.folder, wanted({}), days=300)

    def settings(self, user: str) -> EtcdSettings:
        return EtcdSettings(
            endpoints=tuple(self.etcd.urls), attempt_timeout_s=2.0, **self.certificates.client(FILES.get(user, user))
        )

    @contextlib.asynccontextmanager
    async def as_(self, user: str) -> AsyncIterator[Etcd]:
        """The store as a user sees it. Not by `connect`, which tells a nobody so at once."""
        store = Etcd(self.settings(user), CLOCK)
        store._channels = [open_channel(self.etcd.urls[0], self.settings(user))]
        yield store
        await store.close()

    @contextlib.asynccontextmanager
    async def root(self) -> AsyncIterator[Line]:
        async with Line(self.settings(ROOT)) as line:
            yield line

    async def bootstrap(self, *words: str) -> tuple[int, str, str]:
        return await cli(
            "bootstrap", "etcd", "--endpoints", ",".join(self.etcd.urls),
            "--certs", str(self.certificates.folder), *words,
        )  # fmt: skip


async def cli(*words: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ifabric", *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def cluster_of(size: int, *arguments: str) -> AsyncIterator[Guarded]:
    with needed("etcd"), tempfile.TemporaryDirectory(prefix="ifabric-roles-") as folder:
        certificates = Certificates(Path(folder))
        async with etcd_cluster(size, certificates=certificates, arguments=arguments) as etcd:
            yield Guarded(certificates, etcd)


@pytest.fixture(scope="module")
async def guarded() -> AsyncIterator[Guarded]:
    """With its roles, and access control on."""
    async with cluster_of(3) as made:
        code, out, err = await made.bootstrap("--json")
        assert code == 0, out + err
        yield made


# -- who may do what ---------------------------------------------------------------------------------------------------


def never(key: bytes) -> Compare:
    return Compare(key, Target.VERSION, Op.GREATER, 1 << 40)


async def watched(store: Etcd, prefix: bytes) -> None:
    """Opens a watch, and sees that it tells of something, or at least of how far it is."""
    watch = store.watch((prefix,), after_revision=0)
    async with contextlib.aclosing(watch):
        first = asyncio.ensure_future(anext(watch))
        try:
            while not first.done():
                await store.progress()
                await asyncio.wait({first}, timeout=0.05)
            await first
        finally:
            first.cancel()


async def leased_put(store: Etcd, key: bytes) -> None:
    lease = await store.grant(30)
    try:
        await store.txn(Txn((), (Put(key, b"x", lease),)))
    finally:
        await store.revoke(lease)


async def revoke_anothers(store: Etcd, guarded: Guarded) -> None:
    """A lease with a task on it that another user put there."""
    async with guarded.as_("ifabric") as owner:
        lease = await owner.grant(30)
        await owner.txn(Txn((), (Put(b"tasks/leased", b"x", lease),)))
        try:
            await store._once("revoke", rpc.LeaseRevokeRequest(ID=lease))
        except Forbidden:
            assert await owner.get(b"tasks/leased") is not None
            raise  # it stays, and the list of leases is tried with it


def get(key: bytes) -> Callable[[Etcd, Guarded], Awaitable[Any]]:
    return lambda store, _: store.get(key)


def txn(*then: Any, compares: tuple[Compare, ...] = (), otherwise: tuple[Any, ...] = ()) -> Callable[..., Any]:
    return lambda store, _: store.txn(Txn(compares, then, otherwise))


def raw(stub: str, method: str, request: Any) -> Callable[[Etcd, Guarded], Awaitable[Any]]:
    """A call that the store does not make."""

    async def call(store: Etcd, _: Guarded) -> None:
        channel = store.channel
        made = getattr(getattr(rpc, stub)(channel._channel), method)(request, timeout=5.0)
        try:
            await (made.read() if method == "Snapshot" else made)
        except grpc.aio.AioRpcError as error:
            raise translate(error, channel.user) from None
        finally:
            made.cancel()

    return call


X = b"x"
ALL = (b"\x00", b"\xff")
#: what is tried, and who may: see NAMES. Upper case: may, and it is not tried, since it would change the cluster.
MATRIX: dict[str, tuple[str, Callable[[Etcd, Guarded], Awaitable[Any]]]] = {
    "get tasks/": ("icob", get(b"tasks/x")),
    "get sessions/": ("icob", get(b"sessions/x")),
    "get fabric/": ("icob", get(b"fabric/incarnation")),
    "get chassis/runs/": ("icob", get(b"chassis/runs/x")),
    "get chassis/once/": ("icb", get(b"chassis/once/x")),
    "get payloads/": ("ib", get(b"payloads/x")),
    "get results/": ("ib", get(b"results/x")),
    "get receipts/": ("ib", get(b"receipts/x")),
    "get deadlines/": ("iob", get(b"deadlines/x")),
    "get governor/accounts/": ("iob", get(b"governor/accounts/x")),
    "get governor/secrets/": ("ib", get(b"governor/secrets/permits")),
    "get identity/": ("iob", get(b"identity/agents/x")),
    "get posted/": ("ib", get(b"posted/x")),
    "get elsewhere/": ("b", get(b"elsewhere/x")),
    "get a key that begins like a prefix": ("b", get(b"tasks")),
    "list everything": ("b", lambda store, _: store.range(*ALL)),
    "list governor/": ("ib", lambda store, _: store.range(b"governor/", b"governor0")),
    "list tasks/ and a key further": ("b", lambda store, _: store.range(b"tasks/", b"tasks1")),
    **{f"put {prefix.decode()}": ("icb" if prefix in (b"chassis/", b"audit/") else "ib", txn(Put(prefix + b"probe", X)))
       for prefix in PREFIXES},
    "put elsewhere/": ("b", txn(Put(b"elsewhere/x", X))),
    "put governor/secrets/": ("ib", txn(Put(b"governor/secrets/probe", X))),
    "delete tasks/": ("ib", txn(Delete(b"tasks/probe"))),
    "delete chassis/": ("icb", txn(Delete(b"chassis/probe"))),
    "delete elsewhere/": ("b", txn(Delete(b"elsewhere/x"))),
    "delete everything": ("b", txn(Delete(b"zzz", b"\xff"))),
    "txn over two prefixes": ("ib", txn(Put(b"tasks/probe", X), Put(b"governor/probe", X))),
    "txn with one foreign put": ("b", txn(Put(b"chassis/probe", X), Put(b"elsewhere/x", X))),
    "txn that would not put": ("b", txn(Put(b"elsewhere/x", X), compares=(never(b"fabric/x"),))),
    "txn that reads a payload otherwise": ("ib", txn(otherwise=(Get(b"payloads/x"),))),
    "txn that compares a secret": ("ib", txn(compares=(never(b"governor/secrets/permits"),))),
    "nested put (CVE-2026-33343)": ("b", txn(Txn((), (Put(b"elsewhere/x", X),)))),
    "nested get (CVE-2026-33343)": ("ib", txn(Txn((), (Get(b"governor/secrets/permits"),)))),
    "nested delete": ("b", txn(Txn((), (Delete(b"elsewhere/x"),)))),
    "nested put in the other branch": ("b", txn(otherwise=(Txn((), (Put(b"elsewhere/x", X),)),))),
    "nested twice": ("b", txn(Txn((), (Txn((), (Put(b"elsewhere/x", X),)),)))),
    "nested compare": ("ib", txn(Txn((never(b"payloads/x"),), ()))),
    "nested put of one's own": ("icb", txn(Txn((), (Put(b"chassis/probe", X),)))),
    "leased put chassis/": ("icb", lambda store, _: leased_put(store, b"chassis/probe")),
    "leased put tasks/": ("ib", lambda store, _: leased_put(store, b"tasks/probe")),
    "leased put elsewhere/": ("b", lambda store, _: leased_put(store, b"elsewhere/x")),
    "revoke the lease of another's task": ("ib", revoke_anothers),
    "grant a lease": (EVERYBODY, lambda store, _: store.grant(5)),
    "watch tasks/": ("icob", lambda store, _: watched(store, b"tasks/")),
    "watch payloads/": ("ib", lambda store, _: watched(store, b"payloads/")),
    "watch governor/": ("ib", lambda store, _: watched(store, b"governor/")),
    "watch governor/holds/": ("iob", lambda store, _: watched(store, b"governor/holds/")),
    "watch elsewhere/": ("b", lambda store, _: watched(store, b"elsewhere/")),
    "users": ("b", raw("AuthStub", "UserList", rpc.AuthUserListRequest())),
    "access control, whether it is on": ("b", raw("AuthStub", "AuthStatus", rpc.AuthStatusRequest())),
    "access control off": ("B", raw("AuthStub", "AuthDisable", rpc.AuthDisableRequest())),
    "another user": ("B", raw("AuthStub", "UserAdd", rpc.AuthUserAddRequest(name="mallory", password="m"))),
    "a password for root": (
        "B", raw("AuthStub", "UserChangePassword", rpc.AuthUserChangePasswordRequest(name="root", password="m"))
    ),
    "the role root": ("B", raw("AuthStub", "UserGrantRole", rpc.AuthUserGrantRoleRequest(user="ifabric", role="root"))),
    "more for a role": (
        "B",
        raw("AuthStub", "RoleGrantPermission", rpc.AuthRoleGrantPermissionRequest(
            name="ifabric", perm=rpc.Permission(permType=2, key=b"elsewhere/", range_end=b"elsewhere0"))),
    ),
    "status": ("b", raw("MaintenanceStub", "Status", rpc.StatusRequest())),
    "snapshot": ("b", raw("MaintenanceStub", "Snapshot", rpc.SnapshotRequest())),
    "defragment": ("b", raw("MaintenanceStub", "Defragment", rpc.DefragmentRequest())),
    "hash": ("b", raw("MaintenanceStub", "HashKV", rpc.HashKVRequest())),
    "move the leader": ("B", raw("MaintenanceStub", "MoveLeader", rpc.MoveLeaderRequest(targetID=1))),
    "downgrade": ("B", raw("MaintenanceStub", "Downgrade", rpc.DowngradeRequest(action=1, version="3.4.0"))),
    "compact": ("b", raw("KVStub", "Compact", rpc.CompactionRequest(revision=1))),
    "add a member": ("B", raw("ClusterStub", "MemberAdd", rpc.MemberAddRequest(peerURLs=["https://127.0.0.1:1"]))),
    "remove a member": ("B", raw("ClusterStub", "MemberRemove", rpc.MemberRemoveRequest(ID=1))),
    "raise an alarm": ("B", raw("MaintenanceStub", "Alarm", rpc.AlarmRequest(action=1, alarm=1))),
    "list members": (EVERYBODY, raw("ClusterStub", "MemberList", rpc.MemberListRequest())),
    "list alarms": (EVERYBODY, raw("MaintenanceStub", "Alarm", rpc.AlarmRequest())),
    "list leases, one of which has a task": ("icob", raw("LeaseStub", "LeaseLeases", rpc.LeaseLeasesRequest())),
}  # fmt: skip


async def test_the_permission_matrix_is_as_it_is_stated(guarded: Guarded) -> None:
    """Each user tries everything; what is refused says so in the store's words and names the user."""
    tried, wrong = 0, []
    async with contextlib.AsyncExitStack() as closing:
        stores = {letter: await closing.enter_async_context(guarded.as_(name)) for letter, name in NAMES.items()}
        for what, (allowed, act) in MATRIX.items():
            for letter, store in stores.items():
                if letter.upper() in allowed:
                    continue
                tried += 1
                try:
                    async with asyncio.timeout(10):
                        await act(store, guarded)
                except Forbidden as error:
                    if letter in allowed:
                        wrong.append(f"{what}: {NAMES[letter]} is refused: {error}")
                    if error.facts["user"] != NAMES[letter] or f"the user {NAMES[letter]}" not in error.message:
                        wrong.append(f"{what}: {NAMES[letter]} is not named: {error}")
                except FabricError as error:
                    wrong.append(f"{what}: {NAMES[letter]}: {error!r}")
                else:
                    if letter not in allowed:
                        wrong.append(f"{what}: {NAMES[letter]} is allowed")
    assert wrong == []
    assert tried >= 300
    async with guarded.as_("backup") as root:
        assert await root.get(b"elsewhere/x") is None, "root deleted it last, and nobody else put it"
        await root.txn(Txn((), (Delete(b"\x00", b"\xff"),)))


async def test_who_is_no_user_is_told_so_when_it_connects(guarded: Guarded) -> None:
    store = Etcd(guarded.settings("stranger"), CLOCK)
    with pytest.raises(Forbidden, match="the user stranger, the common name of the certificate") as refused:
        await store.connect()
    assert "user name not found" in refused.value.message


async def test_metrics_are_for_every_certificate_of_the_authority(guarded: Guarded) -> None:
    from ifabric.store.told import alarms, version

    settings = guarded.settings("prometheus")
    assert re.fullmatch(r"3\.\d+\.\d+", await version(guarded.etcd.urls[0], settings))
    assert await alarms(guarded.etcd.urls[0], settings) == ()


# -- a daemon as a user ------------------------------------------------------------------------------------------------

LOOP = '(module (memory (export "memory") 1) (func (export "_start") (loop br 0)))'
HELLO = '(module (memory (export "memory") 1) (func (export "_start")))'
POOL: dict[str, Any] = {"sandbox_pool": {"min_size": 1, "max_size": 1}}


class World(NamedTuple):
    """Daemons beside a guarded etcd."""

    guarded: Guarded
    nats: RealServer
    folder: Path
    closing: contextlib.AsyncExitStack

    async def daemon(self, user: str = "ifabric", **config: Any) -> RealDaemon:
        """A daemon with this user's certificate."""
        etcd = {"coordinator": {"etcd": self.guarded.certificates.client(FILES[user])}, "chassis": POOL}
        daemon = RealDaemon(
            self.folder / f"{user}-{CLOCK.token()[:6]}", self.guarded.etcd.urls, [self.nats.url], etcd | config
        )
        self.closing.push_async_callback(daemon.close)
        return await daemon.start()

    async def client(self, session: str, **options: Any) -> Client:
        client = Client.connect(self.nats.url, session=session, timeout_s=20, **options)
        client.leave_on_exit = False
        return await self.closing.enter_async_context(client)


@pytest.fixture
async def world(guarded: Guarded, nats: RealServer) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as closing:
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="ifabric-roles-"))
        async with guarded.as_("backup") as root:
            await root.txn(Txn((), (Delete(b"\x00", b"\xff"),)))
        yield World(guarded, nats, Path(folder), closing)


async def everything(world: World, name: str) -> None:
    """Tasks, claims with deadlines, money, breakers and guests: what writes something somewhere."""
    client = await world.client(f"{name}-worker", ttl_s=6, account="org")
    await client.set_account("org", 10**9)
    task = f"{name}/one"
    await client.submit([wire.TaskSpec(id=task, payload={"n": 1}, deadline_s=600), wire.TaskSpec(id=f"{name}/two")])
    claim = await client.claim(task, hold_micro_usd=100)
    claim.cost_micro_usd = 7
    module = await client.put_module(wasmtime.wat2wasm(HELLO))
    async with client.hold(1_000) as hold:
        result = await client.run_module(module, wall_s=5, hold=hold)
    assert result.exit_code == 0
    running = asyncio.ensure_future(client.run_module(wasmtime.wat2wasm(LOOP), wall_s=10))
    run = (await eventually(client.runs)).runs
    while not run:
        run = (await client.runs()).runs
        await asyncio.sleep(0.05)
    await client.kill_run(run[0].run, why="seen enough")
    with pytest.raises(ifabric.errors.Killed):
        await running
    async with client.breaker(f"{name}/provider"):
        pass
    await client.set_breaker(f"{name}/provider", "open", why="a test")
    await claim.complete({"done": True})
    await client.spend(3)
    # without an id there is no receipt, by which a lost reply would be recognised: that is what `posted/` is for
    subject = subjects.request("governor", "spend", client.session)
    await client._bus.request(subject, b'{"entry": "e", "amount_micro_usd": 1}', timeout_s=20)
    (await client.claim(f"{name}/two")).ended = True


async def test_a_daemon_does_all_its_work_as_the_user_ifabric_and_keeps_to_its_prefixes(world: World) -> None:
    """Nothing is written outside of the table, and nothing stands in the table for nothing."""
    seen: set[bytes] = set()
    async with world.guarded.as_("backup") as root:
        _, began = await root.range(b"fabric/", b"fabric0")
        watching = asyncio.ensure_future(collect(root, began, seen))
        daemon = await world.daemon()
        await everything(world, "all")
        health = await daemon.health()
        assert (health["status"], health["etcd"], health["warnings"]) == ("healthy", "connected", [])

        async def all_used() -> bool:
            return sum(any(key.startswith(prefix) for key in seen) for prefix in PREFIXES) == len(PREFIXES) - 1

        with contextlib.suppress(TimeoutError):
            await eventually(all_used, 5.0)
        outside = {key for key in seen if not key.startswith(tuple(PREFIXES))}
        used = {prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in seen)}
        watching.cancel()
    assert outside == set()
    assert used == set(PREFIXES) - {b"identity/"}, "identities are off here"
    assert "does not allow" not in daemon.log_text()
    assert "Traceback" not in daemon.log_text()


async def collect(root: Etcd, after: int, seen: set[bytes]) -> None:
    """Every key that is written, by one watch over all there is."""
    call = root.channel.watch()
    await call.write(rpc.WatchRequest(create_request=rpc.WatchCreateRequest(
        key=b"\x00", range_end=b"\x00", start_revision=after + 1)))  # fmt: skip
    while True:
        seen.update(event.kv.key for event in (await call.read()).events)


def test_every_prefix_of_the_sources_is_in_the_table() -> None:
    """As they stand in the code: what is written only now and then is found too."""
    found = set()
    for folder in ("actors", "ifabric/actor", "ifabric/audit", "ifabric/store"):
        for path in (ROOT_FOLDER / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
                    found |= set(re.findall(rb"^[a-z]+/", node.value))
    assert found - {b"secrets/"} == set(PREFIXES), "that one stands below governor/"


@pytest.mark.slow
async def test_a_host_that_only_runs_guests_needs_no_more_than_its_role(world: World) -> None:
    """A coordinator and a governor elsewhere; and what this one must not do, it cannot."""
    await world.daemon(actors=["coordinator", "governor"])
    guests = await world.daemon("ifabric-chassis", actors=["chassis"])
    await everything(world, "apart")
    assert (await guests.health())["status"] == "healthy"
    assert "does not allow" not in guests.log_text()


async def test_a_daemon_whose_certificate_is_no_user_says_so_and_does_not_start(world: World) -> None:
    certificates = world.guarded.certificates
    config = {"coordinator": {"etcd": certificates.client("stranger")}}
    daemon = RealDaemon(world.folder / "nobody", world.guarded.etcd.urls, [world.nats.url], config)
    world.closing.push_async_callback(daemon.close)
    await daemon.start(ready=False)
    assert await daemon.wait() == 1
    assert "the user stranger, the common name of the certificate" in daemon.log_text()


@pytest.mark.slow
async def test_roles_that_change_under_load_are_no_error_to_anybody(world: World) -> None:
    """etcd refuses what came before a change and is carried out after it; the store asks again."""
    daemon = await world.daemon()
    client = await world.client("loaded", ttl_s=10)
    store = await world.closing.enter_async_context(world.guarded.as_("ifabric"))
    stopping, did, old = asyncio.Event(), 0, 0
    once = store.channel.range

    async def counted(*args: Any, **options: Any) -> Any:
        nonlocal old
        try:
            return await once(*args, **options)
        except grpc.aio.AioRpcError as error:
            old += "revision of auth store is old" in (error.details() or "")
            raise

    store.channel.range = counted

    async def agent(number: int) -> None:
        nonlocal did
        for n in range(10_000):
            if stopping.is_set():
                return
            await client.submit([wire.TaskSpec(id=f"load/{number}.{n}")])
            await (await client.claim(f"load/{number}.{n}")).complete()
            did += 1

    async def reader(number: int) -> None:
        while not stopping.is_set():
            await store.get(b"tasks/load")
            await store.txn(Txn((), (Put(b"posted/%d" % number, b"x"),)))
            async with Session.open(store, CLOCK, 5):
                pass

    work = [asyncio.create_task(agent(number)) for number in range(8)]
    work += [asyncio.create_task(reader(number)) for number in range(8)]
    async with world.guarded.root() as line:
        for number in range(60):
            extra = {"permType": READ, "key": b"extra/%d" % number, "range_end": b""}
            await line.auth("RoleGrantPermission", name="ifabric", perm=extra)
            await line.auth("RoleRevokePermission", role="ifabric", key=extra["key"], range_end=b"")
    await world.guarded.bootstrap()
    stopping.set()
    await asyncio.gather(*work)
    print(f"{did} tasks, 120 changes of a role, {old} reads that etcd refused for them and that were asked again")
    assert did > 50
    assert "does not allow" not in daemon.log_text()
    assert "changing" not in daemon.log_text()


async def test_the_store_asks_again_when_etcd_says_that_the_roles_are_newer(guarded: Guarded) -> None:
    """Made certain: the first answer to each kind of call is that one."""

    class Old(grpc.aio.AioRpcError):
        def __init__(self) -> None:
            super().__init__(
                grpc.StatusCode.INVALID_ARGUMENT, grpc.aio.Metadata(), grpc.aio.Metadata(),
                "etcdserver: revision of auth store is old",
            )  # fmt: skip

    async with guarded.as_("ifabric") as store:
        said: list[str] = []
        for name in ("range", "txn", "grant", "revoke", "left"):
            real = getattr(store.channel, name)

            async def once(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
                if name not in said:
                    said.append(name)
                    raise Old
                return await real(*args, **options)

            setattr(store.channel, name, once)
        await store.get(b"tasks/x")
        await store.txn(Txn((), (Put(b"tasks/x", b"x"),)))
        lease = await store.grant(5)
        assert await store.left(lease) > 0
        await store.revoke(lease)
        assert said == ["range", "txn", "grant", "left", "revoke"]
        assert store.rotations == store.attempts_failed == 0, "it is no other endpoint that is needed"


@pytest.mark.slow
async def test_access_control_may_be_turned_on_under_a_daemon_at_work(nats: RealServer) -> None:
    """And who then is full is known, although its status is told to root alone."""
    async with cluster_of(1, f"--quota-backend-bytes={16 << 20}") as guarded, contextlib.AsyncExitStack() as closing:
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="ifabric-roles-"))
        world = World(guarded, nats, Path(folder), closing)
        daemon = await world.daemon()
        client = await world.client("before", ttl_s=10)
        await client.submit([wire.TaskSpec(id="a"), wire.TaskSpec(id="b")])
        claim = await client.claim("a")
        code, out, err = await guarded.bootstrap()
        assert code == 0, out + err
        await claim.complete()
        await (await client.claim("b")).complete()
        assert (await daemon.health())["etcd"] == "connected"
        async with guarded.as_("backup") as root:
            with contextlib.suppress(FabricError):
                for number in range(200):
                    await root.txn(Txn((), (Put(b"elsewhere/%d" % number, b"x" * (1 << 20)),)))

        async def is_full() -> bool:
            return (await daemon.health())["etcd"] == "full"

        await eventually(is_full, 30.0)


# -- the verb ----------------------------------------------------------------------------------------------------------


async def test_bootstrapping_again_changes_nothing_and_says_so(guarded: Guarded) -> None:
    code, out, _ = await guarded.bootstrap("--json")
    said = json.loads(out)
    assert (code, said["steps"], said["enabled"]) == (0, [], True)
    assert {one["user"] for one in said["attempts"]} == {user.name for user in USERS}
    assert all(one["as_stated"] for one in said["attempts"])
    assert len(said["attempts"]) >= 100


async def test_what_a_role_has_too_much_or_too_little_is_put_right(guarded: Guarded) -> None:
    async with guarded.root() as line:
        await line.auth(
            "RoleGrantPermission",
            name="observer",
            perm={"permType": 2, "key": b"elsewhere/", "range_end": b"elsewhere0"},
        )
        await line.auth("RoleRevokePermission", role="ifabric", key=b"tasks/", range_end=b"tasks0")
        await line.auth("UserGrantRole", user="observer", role="ifabric")
        await line.auth(
            "RoleGrantPermission", name="observer", perm={"permType": 2, "key": b"tasks/", "range_end": b"tasks0"}
        )
        code, out, _ = await guarded.bootstrap("--dry-run")
        assert code == 0
        for words in ("role observer loses elsewhere/", "role ifabric reads and writes tasks/",
                      "user observer loses the role ifabric", "role observer reads tasks/"):  # fmt: skip
            assert f"would be made: {words}" in out
        assert len(plan(await look(line))) == 4, "a dry run changes nothing"
        code, out, _ = await guarded.bootstrap()
        assert code == 0, out
        assert plan(await look(line)) == []
        assert len(re.findall(r"✔ \d+ of \d+ as stated", out)) == len(USERS)


async def test_one_who_is_not_root_and_an_etcd_without_tls_are_refused_before_anything(guarded: Guarded) -> None:
    folder = guarded.certificates.folder
    code, _, err = await guarded.bootstrap(
        "--root-cert", str(folder / "backup-client.crt"), "--root-key", str(folder / "backup-client.key")
    )
    assert code == 2 and "is for backup; etcd's administrator is the one for root" in err
    code, _, err = await cli("bootstrap", "etcd", "--endpoints", "http://127.0.0.1:1", "--certs", str(folder))
    assert code == 2 and "without TLS nobody has a certificate to be known by" in err
    code, _, err = await cli("bootstrap", "etcd", "--endpoints", "https://127.0.0.1:1", "--certs", str(folder))
    assert code == 3 and "no etcd answers" in err


@pytest.mark.slow
async def test_what_a_user_may_not_and_yet_can_makes_the_verb_fail(guarded: Guarded) -> None:
    """A role of somebody else's making, under the name of one of our users' certificates."""
    folder = guarded.certificates.folder
    kept = (folder / "client.crt").read_bytes(), (folder / "client.key").read_bytes()
    guarded.certificates.authority.issue("backup", client=True).write(folder, "client")  # so the observer is root
    try:
        code, out, _ = await guarded.bootstrap()
    finally:
        (folder / "client.crt").write_bytes(kept[0])
        (folder / "client.key").write_bytes(kept[1])
    assert code == 1
    assert re.search(r"observer .* ✘ \d+ not as stated", out)


@pytest.mark.slow
async def test_an_etcd_that_takes_no_names_from_certificates_is_left_open_and_not_locked(tmp_path: Path) -> None:
    """It demands certificates, but not `--client-cert-auth`: turned on, nobody could ever turn it off."""
    with needed("etcd"):
        certificates = Certificates(tmp_path)
        make(tmp_path, wanted({}), days=300)
        async with etcd_cluster(1, certificates=certificates, arguments=("--client-cert-auth=false",)) as etcd:
            code, out, err = await cli("bootstrap", "etcd", "--endpoints", etcd.urls[0], "--certs", str(tmp_path))
            assert code == 1, out + err
            assert "with --client-cert-auth. Access control was turned off again" in err
            settings = EtcdSettings(endpoints=tuple(etcd.urls), **certificates.client(ROOT))
            async with Line(settings) as line:
                found = await look(line)
                assert not found.enabled
                assert RESCUER not in found.users
                # and one that somebody turned on, with passwords
                await line.auth("UserChangePassword", name="root", password="theirs")
                await line.auth("AuthEnable")
            code, _, err = await cli("bootstrap", "etcd", "--endpoints", etcd.urls[0], "--certs", str(tmp_path))
            assert code == 1
            assert "the name in our certificate is not taken for its administrator" in err


def test_the_plan_is_empty_when_all_is_there_and_leaves_others_alone() -> None:
    roles = {
        name: frozenset((2 if grant.write else 0, grant.prefix, end_of(grant.prefix)) for grant in grants)
        for name, grants in ROLES.items()
    }
    users = {user.name: frozenset({user.role}) for user in USERS}
    assert plan(Found(True, users, {**roles, "root": frozenset()})) == []
    theirs = {**users, "grafana": frozenset({"metrics"})}
    assert plan(Found(True, theirs, {**roles, "root": frozenset(), "metrics": frozenset({(0, b"", b"\0")})})) == []
    without = plan(Found(False, {}, {}))
    assert [step.method for step in without].count("UserAdd") == len(USERS)
    assert [step.method for step in without].count("RoleGrantPermission") == sum(map(len, ROLES.values()))


def test_ends_of_ranges_are_the_stores() -> None:
    assert all(end_of(prefix) == prefix_end(prefix) for prefix in PREFIXES)
