"""The same reservation elsewhere: in Redis, in Postgres, and in etcd by hand. Each as somebody would write it who knows
the program and wants it fast, and as safe: a reply means that it is on disk.

What all of them do. `reserve`: unless there is a hold of this id, see that every account of the path has the amount
within its limit, add it to what each holds, and keep the hold by its id. `commit`: unless it was done, take it off
again, add the cost to what was spent, and keep what became of the hold. So both may be sent twice. What they do not do:
end a hold when its owner dies, receipts, events, an answer that tells the path's balances.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
import json
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aetcd
from aetcd import rpc

from ifabric.embedded import free_port

CALLERS = 64
#: connections to Postgres. On hot rows eight were two to three times as fast as 64, and on others as fast.
POOL = 8
START_S = 20.0
LIMIT = 2**50
ESTIMATE, COST = 1_000, 700
Path4 = tuple[str, str, str, str]


class MissingError(Exception):
    """A program or a package that is not here."""


# -- Redis ----------------------------------------------------------------------------------------------------------------

RESERVE_LUA = """
local hold = redis.call('HGET', KEYS[5], 'amount')
if hold then return hold == ARGV[1] and 1 or -1 end
local x = tonumber(ARGV[1])
for i = 1, 4 do
  local a = redis.call('HMGET', KEYS[i], 'limit', 'spent', 'held')
  if a[1] and tonumber(a[2] or 0) + tonumber(a[3] or 0) + x > tonumber(a[1]) then return 0 end
end
for i = 1, 4 do redis.call('HINCRBY', KEYS[i], 'held', x) end
redis.call('HSET', KEYS[5], 'state', 'open', 'amount', x)
return 1
"""
COMMIT_LUA = """
local hold = redis.call('HMGET', KEYS[5], 'state', 'amount', 'charged')
if not hold[1] then return 0 end
if hold[1] == 'committed' then return hold[3] == ARGV[1] and 1 or -1 end
for i = 1, 4 do
  redis.call('HINCRBY', KEYS[i], 'held', -tonumber(hold[2]))
  redis.call('HINCRBY', KEYS[i], 'spent', ARGV[1])
end
redis.call('HSET', KEYS[5], 'state', 'committed', 'charged', ARGV[1])
redis.call('EXPIRE', KEYS[5], 604800)
return 1
"""


class Redis:
    """A Lua script over the path's four hashes and the hold; every write is on disk before it is answered."""

    name = "redis"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pids: dict[str, int] = {}

    async def connect(self) -> None:
        redis = _package("redis.asyncio")
        program, port = _program("redis-server"), free_port()
        arguments = {"port": port, "bind": "127.0.0.1", "dir": self._folder, "appendonly": "yes",
                     "appendfsync": "always", "save": "", "daemonize": "no", "loglevel": "warning"}  # fmt: skip
        flags = [word for key, value in arguments.items() for word in (f"--{key}", str(value))]
        self._server = subprocess.Popen([program, *flags], stdout=subprocess.DEVNULL)
        self.pids = {self.name: self._server.pid}
        self._client = redis.Redis(port=port, max_connections=CALLERS)
        self._reserve = self._client.register_script(RESERVE_LUA)
        self._commit = self._client.register_script(COMMIT_LUA)
        await _until(self._client.ping, self._server)
        self.version = f"redis {(await self._client.info())['redis_version']}, appendfsync always"

    async def found(self, paths: Sequence[Path4]) -> None:
        pipe = self._client.pipeline(transaction=False)
        for name in _names(paths):
            pipe.hset(name, "limit", LIMIT)
        await pipe.execute()

    async def pair(self, path: Path4, hold: str) -> None:
        keys = (*path, f"hold/{path[-1]}/{hold}")
        if await self._reserve(keys, (ESTIMATE,)) != 1 or await self._commit(keys, (COST,)) != 1:
            raise SystemExit("redis refused")

    async def totals(self, account: str) -> tuple[int, int]:
        spent, held = await self._client.hmget(account, "spent", "held")
        return int(spent), int(held)

    async def close(self) -> None:
        await self._client.aclose()
        _end(self._server)


# -- Postgres -------------------------------------------------------------------------------------------------------------

SCHEMA = """
create table account (name text primary key, lim bigint, spent bigint not null default 0, held bigint not null default 0)
    with (fillfactor = 50);
create table hold (id text primary key, path text[] not null, amount bigint not null, state text not null,
    charged bigint not null default 0, at timestamptz not null default now());
create function reserve(h text, p text[], x bigint) returns int language plpgsql as $$
declare moved int;
begin
    insert into hold (id, path, amount, state) values (h, p, x, 'open') on conflict do nothing;
    if not found then
        return (select case when amount = x then 1 else -1 end from hold where id = h);
    end if;
    -- in one order everywhere (the root first), so that no two wait for each other
    perform 1 from account where name = any(p) order by length(name), name for update;
    update account set held = held + x where name = any(p) and spent + held + x <= lim;
    get diagnostics moved = row_count;
    if moved < array_length(p, 1) then
        raise exception 'budget short';
    end if;
    return 1;
end $$;
create function settle(h text, x bigint) returns int language plpgsql as $$
declare found_hold hold;
begin
    select * into found_hold from hold where id = h for update;
    if not found then return 0; end if;
    if found_hold.state = 'committed' then
        return case when found_hold.charged = x then 1 else -1 end;
    end if;
    perform 1 from account where name = any(found_hold.path) order by length(name), name for update;
    update account set held = held - found_hold.amount, spent = spent + x where name = any(found_hold.path);
    update hold set state = 'committed', charged = x where id = h;
    return 1;
end $$;
"""
SETTINGS = {
    "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": CALLERS + 10,
    "shared_buffers": "512MB", "max_wal_size": "4GB", "synchronous_commit": "on", "fsync": "on", "jit": "off",
    "log_min_messages": "error", "checkpoint_timeout": "30min",
}  # fmt: skip


class Postgres:
    """Row locks on the path, in order; one function and so one round trip each, prepared."""

    name = "postgres"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seats: list[tuple[asyncio.Lock, list[Any]]] = []
        self._turns = itertools.count()
        self.pids: dict[str, int] = {}

    async def connect(self) -> None:
        asyncpg = _package("asyncpg")
        initdb, postgres, port = _program("initdb"), _program("postgres"), free_port()
        data = self._folder / "data"
        data.mkdir()
        options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": data}
        if os.geteuid() == 0:  # Postgres refuses to run as root
            shutil.chown(data, "postgres", "postgres")
            options |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        arguments = (initdb, "-D", data, "-U", "bench", "--auth=trust", "--locale=C", "-E", "UTF8")
        if (await asyncio.to_thread(subprocess.run, arguments, check=False, **options)).returncode:
            raise MissingError("initdb failed")
        flags = [word for key, value in {**SETTINGS, "port": port}.items() for word in ("-c", f"{key}={value}")]
        self._server = subprocess.Popen([postgres, "-D", data, *flags], **options)
        self.pids = {self.name: self._server.pid}
        where = f"postgresql://bench@127.0.0.1:{port}/postgres"

        async def answers() -> None:
            await (await asyncpg.connect(where)).close()

        await _until(answers, self._server)
        self._connections = [await asyncpg.connect(where) for _ in range(POOL)]
        self._one = self._connections[0]
        await self._one.execute(SCHEMA)
        for connection in self._connections:
            prepared = [
                await connection.prepare(f"select {call}") for call in ("reserve($1, $2, $3)", "settle($1, $2)")
            ]
            self._seats.append((asyncio.Lock(), prepared))
        version = await self._one.fetchval("show server_version")
        self.version = f"postgres {version}, synchronous_commit on, {POOL} connections"

    async def found(self, paths: Sequence[Path4]) -> None:
        rows = [(name, LIMIT) for name in _names(paths)]
        await self._one.executemany("insert into account (name, lim) values ($1, $2) on conflict do nothing", rows)

    async def pair(self, path: Path4, hold: str) -> None:
        hold = f"{path[-1]}/{hold}"
        reserved = await self._call(0, hold, path, ESTIMATE)
        settled = await self._call(1, hold, COST)
        if (reserved, settled) != (1, 1):
            raise SystemExit("postgres refused")

    async def _call(self, which: int, *arguments: Any) -> Any:
        """On the connections in turn, each used in order: an asyncpg pool would send a reset after each call."""
        lock, prepared = self._seats[next(self._turns) % POOL]
        async with lock:
            return await prepared[which].fetchval(*arguments)

    async def totals(self, account: str) -> tuple[int, int]:
        row = await self._one.fetchrow("select spent, held from account where name = $1", account)
        return row["spent"], row["held"]

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()
        _end(self._server)


# -- etcd -----------------------------------------------------------------------------------------------------------------


class DirectEtcd:
    """Compare-and-swap over the four keys and the hold, on what the refusing transaction itself has read."""

    name = "etcd"

    def __init__(self, url: str, pid: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._client = aetcd.Client(host=host, port=int(port))
        self.pids = {"etcd": pid}
        self.lost = 0
        self._chance = random.Random(7)
        self._seen: dict[bytes, tuple[bytes, int]] = {}

    async def connect(self) -> None:
        await self._client.connect()
        self.version = f"etcd {(await self._client.status()).version}, by hand"

    async def found(self, paths: Sequence[Path4]) -> None:
        for name in _names(paths):
            await self._client.put(b"bench/" + name.encode(), _tally(0, 0))

    async def pair(self, path: Path4, hold: str) -> None:
        keys = [b"bench/" + name.encode() for name in path]
        key = b"bench/hold/" + f"{path[-1]}/{hold}".encode()
        absent = rpc.Compare(key=key, target=rpc.Compare.CREATE, result=rpc.Compare.EQUAL, create_revision=0)
        revision = await self._swap(keys, key, absent, held=ESTIMATE, spent=0, record=b'{"state":"open","amount":1000}')
        same = rpc.Compare(key=key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=revision)
        await self._swap(keys, key, same, held=-ESTIMATE, spent=COST, record=b'{"state":"committed","charged":700}')

    async def _swap(self, keys: list[bytes], hold: bytes, own: Any, *, held: int, spent: int, record: bytes) -> int:
        lost = 0
        while True:
            compares, puts = [own], [_put(hold, record)]
            for key in keys:
                value, revision = self._seen.get(key, (_tally(0, 0), 0))
                tally = json.loads(value)
                if tally["spent"] + tally["held"] + held > LIMIT:
                    raise SystemExit("etcd refused")
                compares.append(
                    rpc.Compare(key=key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=revision)
                )
                puts.append(_put(key, _tally(tally["spent"] + spent, tally["held"] + held)))
            reads = [rpc.RequestOp(request_range=rpc.RangeRequest(key=key)) for key in keys]
            answer = await self._client.kvstub.Txn(rpc.TxnRequest(compare=compares, success=puts, failure=reads))
            revision = answer.header.revision
            if answer.succeeded:
                for key, put in zip(keys, puts[1:], strict=True):
                    self._learn(key, put.request_put.value, revision)
                return int(revision)
            for key, got in zip(keys, answer.responses, strict=True):
                (kv,) = got.response_range.kvs
                self._learn(key, kv.value, kv.mod_revision)
            lost += 1
            self.lost += 1
            await asyncio.sleep(self._chance.uniform(0, 0.001 * min(lost, 32)))

    def _learn(self, key: bytes, value: bytes, revision: int) -> None:
        if self._seen.get(key, (b"", 0))[1] < revision:
            self._seen[key] = (value, revision)

    async def totals(self, account: str) -> tuple[int, int]:
        found = json.loads((await self._client.get(b"bench/" + account.encode())).value)
        return found["spent"], found["held"]

    async def close(self) -> None:
        await self._client.close()


def _tally(spent: int, held: int) -> bytes:
    return b'{"spent":%d,"held":%d}' % (spent, held)


def _put(key: bytes, value: bytes) -> Any:
    return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value))


# -- what they share ------------------------------------------------------------------------------------------------------


def _names(paths: Sequence[Path4]) -> list[str]:
    return list(dict.fromkeys(name for path in paths for name in path))


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingError(f"the package {name.partition('.')[0]} is not installed: uv sync --group bench") from None


def _program(name: str) -> str:
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise MissingError(f"{name} is not installed")
    return found


async def _until(answers: Any, server: subprocess.Popen[bytes]) -> None:
    """Returns when the server answers."""
    async with asyncio.timeout(START_S):
        while True:
            if server.poll() is not None:
                raise MissingError(f"{server.args[0]} did not start")  # type: ignore[index]
            with contextlib.suppress(Exception):
                await answers()
                return
            await asyncio.sleep(0.05)


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()


@contextlib.asynccontextmanager
async def beside(folder: Path, etcd_url: str, etcd_pid: int) -> AsyncIterator[tuple[list[Any], list[str]]]:
    """What is here of the three, connected; and what is missing."""
    sides: list[Any] = []
    missing: list[str] = []
    os.chmod(folder, 0o711)  # the user postgres has to get through  # noqa: PTH101
    try:
        for side in (Redis(folder / "redis"), Postgres(folder / "postgres"), DirectEtcd(etcd_url, etcd_pid)):
            with contextlib.suppress(FileExistsError):
                (folder / side.name).mkdir(mode=0o711)
            try:
                await side.connect()
                sides.append(side)
            except MissingError as error:
                missing.append(f"{side.name}: {error}")
        yield sides, missing
    finally:
        for side in sides:
            await side.close()
