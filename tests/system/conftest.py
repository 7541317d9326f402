"""Whole clusters of real processes: etcd, nats-server and daemons, each test with its own, to be hurt at will."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ifabric.bus.nats import Nats, NatsSettings
from ifabric.cancellation import cancel_and_wait
from ifabric.cli.verdict import Verdict, judge
from ifabric.client import Client
from ifabric.clock import SystemClock, monotonic
from ifabric.errors import FabricError, NoTaskMatches, from_body
from ifabric.store.base import Delete, Txn, prefix_end
from ifabric.store.etcd import Etcd, EtcdSettings
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer, etcd_server, nats_server
from ifabric.wire import coordinator as wire
from ifabric.wire import subjects
from ifabric_actors.coordinator import records
from tests.conftest import needed

CLOCK = SystemClock()


async def eventually(true: Callable[[], Awaitable[Any]], within_s: float = 15.0) -> Any:
    """The first truthy answer. `TimeoutError` when there is none in time."""
    async with asyncio.timeout(within_s):
        while not (found := await true()):
            await asyncio.sleep(0.02)
    return found


class Cluster:
    """One etcd, one nats-server, and as many daemons as a test wants."""

    def __init__(self, etcd: RealServer, nats: RealServer, folder: Path, closing: contextlib.AsyncExitStack) -> None:
        self.etcd, self.nats = etcd, nats
        self._folder = folder
        self.closing = closing
        self.daemons: list[RealDaemon] = []
        self.store = Etcd(EtcdSettings(endpoints=(etcd.url,)), CLOCK)
        self.bus = Nats(NatsSettings(servers=(nats.url,)), CLOCK)

    def another(self, *, etcd: str | None = None, nats: str | None = None, **options: Any) -> RealDaemon:
        """One more daemon, not yet started; `etcd` and `nats` name the way to them when it is not the straight one."""
        folder = self._folder / f"daemon-{len(self.daemons)}"
        made = RealDaemon(folder, [etcd or self.etcd.url], [nats or self.nats.url], **options)
        self.daemons.append(made)
        return made

    async def daemon(self, **options: Any) -> RealDaemon:
        """One more daemon, ready."""
        return await self.another(**options).start()

    async def many(self, number: int) -> list[RealDaemon]:
        """So many daemons, ready; they start side by side."""
        return list(await asyncio.gather(*(self.daemon() for _ in range(number))))

    async def client(self, session: str, *, nats: str | None = None, **options: Any) -> Client:
        """A client of the SDK. It ends with the test, without a word."""
        client = Client.connect(nats or self.nats.url, session=session, **options)
        client.leave_on_exit = False
        return await self.closing.enter_async_context(client)

    async def ask(
        self,
        verb: str,
        session: str,
        *,
        timeout_s: float = 2.0,
        component: str = "coordinator",
        admin: bool = False,
        **body: Any,
    ) -> dict[str, Any]:
        """One request without any retry; the reply, or the refusal as an exception."""
        subject = subjects.request(component, verb, session, admin=admin)
        answer = await self.bus.request(subject, msgspec.json.encode(body), timeout_s=timeout_s)
        reply: dict[str, Any] = msgspec.json.decode(answer.data)
        if "Nats-Service-Error-Code" in answer.headers:
            raise from_body(reply)
        return reply

    async def record(self, task: str) -> records.Task:
        """What etcd knows of a task."""
        kv = await self.store.get(records.task_key(task))
        assert kv is not None, f"{task} is in etcd"
        return records.stored(kv).task

    async def all_records(self) -> dict[str, records.Task]:
        """What etcd knows of every task."""
        got, _ = await self.store.range(records.TASKS, prefix_end(records.TASKS))
        return {kv.key[len(records.TASKS) :].decode(): records.stored(kv).task for kv in got.kvs}

    async def events(self, done: Iterable[str]) -> list[wire.TaskEvent]:
        """What the journal tells of these tasks, to where it tells of the completion of each."""
        reader = await self.client("journal-reader")
        journal = await reader.journal()
        events: list[wire.TaskEvent] = []
        wanted = set(done)
        missing = set(wanted)
        seen = 0
        async with asyncio.timeout(30):
            while missing:
                last = await journal.last()
                if last is not None and last.seq > seen:
                    fresh = [event async for event in reader.events(after_seq=seen, until_seq=last.seq)]
                    missing -= {event.task for event in fresh if event.event == "completed"}
                    events += (event for event in fresh if event.task in wanted or event.event == "resync")
                    seen = last.seq
                else:
                    await asyncio.sleep(0.05)
        return events

    async def close(self) -> None:
        """Ends the daemons. None may have met what it did not expect."""
        await asyncio.gather(*(daemon.close() for daemon in self.daemons))
        for daemon in self.daemons:
            assert "Traceback" not in daemon.log_text(), daemon.log_text()[-5000:]


class Load:
    """Agents at work, until told to stop: each puts a task on the board, takes any task, and completes it.

    Nothing is retried here but what the SDK retries: an error that reaches an agent is kept in `errors`.
    """

    def __init__(self, cluster: Cluster, agents: int, *, pause_s: float = 0.0) -> None:
        self._cluster = cluster
        self._agents = agents
        #: tells this load's tasks from those of another in the same journal
        self._name = CLOCK.token()[:8]
        self._pause_s = pause_s
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self.submitted: list[str] = []
        #: task -> fences under which an agent was told that it is completed
        self.completed: dict[str, list[int]] = {}
        self.errors: list[str] = []
        #: the longest that a request took, in seconds, and what it was
        self.longest: tuple[float, str] = (0.0, "")
        self.requests = 0
        #: what an agent was told that it holds, or has put on the board
        self.granted: list[tuple[str, int]] = []
        self.accepted: list[str] = []

    async def start(self) -> Load:
        clients = [await self._cluster.client(f"agent-{n}", ttl_s=30) for n in range(self._agents)]
        self._tasks = [asyncio.create_task(self._work(client)) for client in clients]
        self._cluster.closing.push_async_callback(cancel_and_wait, *self._tasks)
        return self

    async def reach(self, completed: int, within_s: float = 30.0) -> None:
        """Returns when so many tasks are done."""

        async def reached() -> bool:
            return len(self.completed) >= completed

        await eventually(reached, within_s)

    async def stop(self, within_s: float = 60.0) -> None:
        """Lets the agents work off what is on the board, and go."""
        self._stopping = True
        async with asyncio.timeout(within_s):
            await asyncio.gather(*self._tasks)

    async def _work(self, client: Client) -> None:
        for number in range(1_000_000):
            if not self._stopping:
                task = f"load/{self._name}/{client.session}.{number}"
                self.submitted.append(task)
                if await self._timed(f"submit {task}", client.submit([wire.TaskSpec(id=task)])) is not None:
                    self.accepted.append(task)
            claim = await self._timed("next", client.next())
            if claim is not None:
                self.granted.append((claim.task, claim.fence))
                await self._timed(f"complete {claim.task}", claim.complete({"by": client.session}))
                if claim.ended:
                    self.completed.setdefault(claim.task, []).append(claim.fence)
            elif self._stopping:
                return
            if self._pause_s:
                await asyncio.sleep(self._pause_s)  # the work itself

    async def _timed(self, what: str, request: Awaitable[Any]) -> Any:
        began = monotonic()
        self.requests += 1
        try:
            return await request
        except NoTaskMatches:
            return None
        except FabricError as error:
            self.errors.append(f"{what}: {error!r}")
            return None
        finally:
            self.longest = max(self.longest, (monotonic() - began, what))

    def figures(self) -> str:
        """What was measured, in a line."""
        return f"{self.requests} requests, the longest {self.longest[0]:.2f} s ({self.longest[1]})"

    async def verdict(self) -> Verdict:
        """Judges what was done by the journal, and holds it against etcd's records and what the agents were told."""
        known = await self._cluster.all_records()
        assert {task for task, record in known.items() if record.state != "done"} == set()
        assert set(known) == set(self.submitted)
        assert all(fences == [known[task].fence] for task, fences in self.completed.items())
        return judge(await self._cluster.events(self.submitted), self.submitted)

    async def nothing_acknowledged_is_lost(self) -> Verdict:
        """Holds what agents were told against etcd's records and the journal; the verdict over what was completed."""
        known = await self._cluster.all_records()
        assert set(self.accepted) <= set(known)
        for task, fences in self.completed.items():
            assert (known[task].state, fences) == ("done", [known[task].fence])
        events = await self._cluster.events(self.completed)
        claims = {(event.task, event.fence) for event in events if event.event == "claimed"}
        assert set(self.granted) <= claims
        return judge(events, self.completed)


@contextlib.asynccontextmanager
async def servers(**etcd_options: Any) -> AsyncIterator[tuple[RealServer, RealServer]]:
    """An etcd and a nats-server."""
    async with contextlib.AsyncExitStack() as closing:
        with needed("etcd and nats-server"):
            etcd = await closing.enter_async_context(etcd_server(**etcd_options))
            nats = await closing.enter_async_context(nats_server())
        yield etcd, nats


@contextlib.asynccontextmanager
async def around(etcd: RealServer, nats: RealServer) -> AsyncIterator[Cluster]:
    """A cluster on these servers, empty, without daemons."""
    async with contextlib.AsyncExitStack() as closing:
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="ifabric-system-"))
        cluster = Cluster(etcd, nats, Path(folder), closing)
        for one in (cluster.store, cluster.bus):
            await one.connect()
            closing.push_async_callback(one.close)
        closing.push_async_callback(cluster.close)
        await cluster.store.txn(Txn((), (Delete(b"\x00", b"\xff"),)))
        yield cluster


@pytest.fixture(scope="module")
async def sound() -> AsyncIterator[tuple[RealServer, RealServer]]:
    """The module's servers, which nobody hurts."""
    async with servers() as pair:
        yield pair


@pytest.fixture
async def cluster(sound: tuple[RealServer, RealServer]) -> AsyncIterator[Cluster]:
    """A cluster for tests that hurt its daemons and connections, not its servers."""
    async with around(*sound) as made:
        yield made


@pytest.fixture
async def fragile() -> AsyncIterator[Cluster]:
    """A cluster with servers of the test's own, to be hurt."""
    async with servers() as pair, around(*pair) as made:
        yield made
