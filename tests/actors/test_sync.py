"""The SDK without `await`, and the runbook's calls, from plain threads and scripts, against a daemon of its own process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from ifabric import errors
from ifabric.sync import Background, Coordinator, EventBus, SyncClient
from ifabric.testing.daemons import RealDaemon
from ifabric.testing.servers import RealServer, nats_server
from tests.conftest import emptied, needed

PATIENCE_S = 15.0


@pytest.fixture(scope="module")
async def daemon(
    etcd: RealServer, nats: RealServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RealDaemon]:
    async with emptied(etcd.url):
        pass
    started = await RealDaemon(tmp_path_factory.mktemp("sync"), [etcd.url], [nats.url]).start()
    yield started
    await started.close()


async def script(work: Callable[..., Any], *arguments: Any) -> Any:
    """Runs it as a script would run: on a thread without a loop."""
    async with asyncio.timeout(60):
        return await asyncio.to_thread(work, *arguments)


class Heard:
    """A callback that remembers."""

    def __init__(self, act: Callable[[dict[str, Any]], None] = lambda event: None) -> None:
        self.events: list[dict[str, Any]] = []
        self.threads: set[str] = set()
        self._more = threading.Condition()
        self._act = act

    def __call__(self, event: dict[str, Any]) -> None:
        with self._more:
            self.events.append(event)
            self.threads.add(threading.current_thread().name)
            self._more.notify_all()
        self._act(event)

    def wait(self, task: str, what: str) -> dict[str, Any]:
        """The first event of that kind about that task."""

        def found() -> dict[str, Any] | None:
            return next((e for e in self.events if (e.get("task"), e["event"]) == (task, what)), None)

        with self._more:
            assert self._more.wait_for(lambda: found() is not None, PATIENCE_S), f"no {what} of {task}: {self.events}"
            return found() or {}


# -- the client -------------------------------------------------------------------------------------------------------------


async def test_a_worker_without_await(daemon: RealDaemon, nats: RealServer) -> None:
    def work() -> None:
        with SyncClient(nats.url, session="plain", capabilities=["python"]) as c:
            assert c.session == "plain"
            assert c.submit([{"id": f"S{n}", "payload": n, "needs": ["python"]} for n in range(3)]).created
            for claim in c.tasks(until_empty=True):
                with claim:
                    claim.complete(claim.spec.payload + 1)
            assert [c.get(f"S{n}").result for n in range(3)] == [1, 2, 3]
            assert {line.task for line in c.list(state="done").tasks} >= {"S0", "S1", "S2"}
            c.submit([{"id": "S-bad", "max_attempts": 1}])
            with pytest.raises(ValueError, match="no good"), c.claim("S-bad"):
                raise ValueError("no good")
            assert (c.get("S-bad").state, c.get("S-bad").error) == ("dead", "ValueError: no good")
            assert c.requeue("S-bad").state == "pending"
            with pytest.raises(KeyboardInterrupt), c.next() as claim:
                raise KeyboardInterrupt
            assert c.get("S-bad").history[-1].event == "released"
            with c.claim("S-bad") as claim:
                c.cancel("S-bad")
                with pytest.raises(errors.ClaimLost):
                    claim.complete()
                assert claim.is_lost
            with pytest.raises(errors.NoTaskMatches):
                c.next()
        with pytest.raises(errors.FabricError, match="the client is closed"):
            c.list()

    before = threading.active_count()
    await script(work)
    assert threading.active_count() <= before + 1  # that of `script` itself stays


async def test_a_loop_that_is_left_early_leaves_nothing_behind(daemon: RealDaemon, nats: RealServer) -> None:
    def work() -> None:
        with SyncClient(nats.url, session="early") as c:
            c.submit([{"id": "E1"}, {"id": "E2"}])
            for claim in c.tasks(until_empty=True):
                assert claim.task == "E1"
                break
        with SyncClient(nats.url, session="after") as c:
            assert c.get("E1").state == "pending"
            for task in ("E1", "E2"):
                c.cancel(task)

    await script(work)


async def test_nobody_there_is_unreachable_and_leaves_no_thread(tmp_path: Any) -> None:
    def work() -> None:
        with pytest.raises(errors.Unreachable):
            SyncClient("nats://127.0.0.1:9", timeout_s=0.3).__enter__()
        with pytest.raises(ValueError, match="session id"):
            SyncClient("nats://127.0.0.1:9", session="a.b")

    before = {thread for thread in threading.enumerate() if thread.name == "ifabric"}
    await script(work)
    assert {thread for thread in threading.enumerate() if thread.name == "ifabric"} == before


async def test_closing_ends_what_still_runs_in_the_background() -> None:
    def work() -> None:
        background = Background()
        ended = threading.Event()

        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        future = background.start(forever())
        background.close()
        background.close()
        assert ended.is_set()
        assert future.cancelled()

    await script(work)


# -- the runbook's calls ------------------------------------------------------------------------------------------------------


async def test_the_runbooks_smoke_tests_run_after_a_change_of_the_import(daemon: RealDaemon, nats: RealServer) -> None:
    """As scripts: each a process that ends without closing anything, and says nothing it was not asked to say."""
    head = f"""
        from ifabric import Coordinator, EventBus
        bus = EventBus('etcd', {{'endpoints': ['https://etcd-1:2379'], 'ca_cert': '/ca.crt', 'nats': '{nats.url}'}})
        assert bus.connect(), 'cannot connect'
        coordinator = Coordinator(bus)
        """
    claim = "assert coordinator.claim_task('TEST-001', 'validation-session')\nprint('claimed')"
    events = """
        import threading
        seen = threading.Event()
        coordinator.subscribe_task_updates(lambda e: (print(f'Event: {e}'), e['event'] == 'claimed' and seen.set()))
        coordinator.claim_task('TEST-002', 'validation-session')
        assert seen.wait(15)
        """
    latency = """
        import time
        latencies = []
        for i in range(100):
            start = time.time()
            coordinator.claim_task(f'TEST-{i}', 'bench-session')
            latencies.append((time.time() - start) * 1000)
        print('p95', sorted(latencies)[94])
        assert all(coordinator.get_task(f'TEST-{i}')['session'] == 'bench-session' for i in range(100))
        """

    async def run(body: str) -> str:
        text = textwrap.dedent(head) + textwrap.dedent(body)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-X", "dev", "-c", text, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        async with asyncio.timeout(60):
            out, err = await process.communicate()
        assert (process.returncode, err.decode()) == (0, ""), out.decode()
        return out.decode()

    assert await run(claim) == "claimed\n"
    assert "'event': 'claimed'" in await run(events)
    assert (await run(latency)).startswith("p95 ")

    def left() -> list[Any]:
        with SyncClient(nats.url, session="looks") as c:
            return [c.get(task).session for task in ("TEST-001", "TEST-002", "TEST-7")]

    assert await script(left) == [None, None, None]  # a script that ends gives back what it holds


async def test_the_calls_say_whether_the_session_holds_the_task(daemon: RealDaemon, nats: RealServer) -> None:
    def work() -> None:
        bus = EventBus("etcd", {"nats": [nats.url]})
        other = EventBus("nats", {"nats": nats.url})
        mine, theirs = Coordinator(bus), Coordinator(other)
        try:
            assert mine.claim_task("R1", "one")
            assert mine.claim_task("R1", "one")
            assert not mine.claim_task("R1", "two")
            assert mine.get_task("R1")["session"] == "one"
            assert not mine.release_task("R1", "two")
            assert not mine.release_task("R-unknown", "one")
            assert theirs.release_task("R1", "one")  # the same session, from another process as it were
            assert not mine.complete_task("R1", "one")
            assert theirs.claim_task("R1", "two")
            assert mine.complete_task("R1", "two", {"answer": 42})
            assert mine.get_task("R1")["result"] == {"answer": 42}
            assert not mine.claim_task("R1", "one")  # it is done
            assert mine.claim_task("R2", "one")
            assert mine.fail_task("R2", "one", "no luck")
            assert (mine.get_task("R2")["state"], mine.get_task("R2")["error"]) == ("pending", "no luck")
            assert mine.claim_task("R2", "one")
            bus.session("one").cancel("R2")
            assert not mine.complete_task("R2", "one")
            assert not mine.claim_task("R2", "one")
            with pytest.raises(errors.UnknownTask):
                mine.get_task("R-unknown")
        finally:
            bus.close()
            bus.close()
            other.close()

    await script(work)


async def test_an_event_bus_without_a_daemon_says_why(tmp_path: Any) -> None:
    """Also when NATS is there and no daemon behind it."""

    def work(config: dict[str, Any]) -> str:
        bus = EventBus("etcd", {**config, "timeout_seconds": 0.3})
        try:
            assert not bus.connect()
        finally:
            bus.close()
        return bus.error

    with needed("nats-server"):
        async with nats_server() as alone:
            assert "is the daemon running?" in await script(work, {"nats": alone.url})
    assert "127.0.0.1:9" in await script(work, {"nats": "nats://127.0.0.1:9"})
    assert "ifabric run" in await script(work, {"state_dir": str(tmp_path)})
    with pytest.raises(ValueError, match="no backend 'redis'"):
        EventBus("redis")


# -- subscriptions --------------------------------------------------------------------------------------------------------------


async def test_a_callback_that_raises_is_logged_and_told_of_the_next_event(
    daemon: RealDaemon, nats: RealServer, caplog: pytest.LogCaptureFixture
) -> None:
    def work() -> None:
        bus = EventBus("etcd", {"nats": nats.url})
        coordinator = Coordinator(bus)

        def fall(event: dict[str, Any]) -> None:
            raise LookupError("a bug of the script's")

        heard = Heard(fall)
        subscription = coordinator.subscribe_task_updates(heard)
        coordinator.claim_task("C1", "caller")
        heard.wait("C1", "submitted")
        heard.wait("C1", "claimed")
        coordinator.release_task("C1", "caller")
        heard.wait("C1", "released")
        subscription.close()
        subscription.close()
        assert subscription.failures >= 3
        seen = len(heard.events)
        coordinator.claim_task("C1", "caller")
        bus.close()
        assert len(heard.events) == seen, "no call after close"

    await script(work)
    assert "the callback failed on the event claimed of task C1" in caplog.text
    assert "a bug of the script's" in caplog.text


async def test_a_callback_may_call_the_fabric_and_take_its_time(daemon: RealDaemon, nats: RealServer) -> None:
    """It runs on a thread of its own: on the client's loop, asking would wait for itself, and renewals for it."""

    def work() -> None:
        bus = EventBus("etcd", {"nats": nats.url})
        coordinator = Coordinator(bus)
        states: list[str] = []

        def ask(event: dict[str, Any]) -> None:
            if event["event"] == "claimed":
                states.append(coordinator.get_task(event["task"])["state"])
                coordinator.complete_task(event["task"], event["session"])

        heard = Heard(ask)
        subscription = coordinator.subscribe_task_updates(heard)
        coordinator.claim_task("D1", "caller")
        heard.wait("D1", "completed")
        assert states[-1] == "claimed"
        assert heard.threads == {"ifabric events"}
        subscription.close()
        bus.close()

    await script(work)


async def test_a_subscription_outlives_the_daemon_and_ends_with_its_connection(
    etcd: RealServer, nats: RealServer, tmp_path: Any, daemon: RealDaemon
) -> None:
    def begin() -> tuple[EventBus, Coordinator, Heard, Any]:
        bus = EventBus("etcd", {"nats": nats.url})
        coordinator, heard = Coordinator(bus), Heard()
        return bus, coordinator, heard, coordinator.subscribe_task_updates(heard)

    bus, coordinator, heard, subscription = await script(begin)
    await daemon.terminate()
    await daemon.start()

    def go_on() -> None:
        assert coordinator.claim_task("G1", "caller")
        heard.wait("G1", "claimed")
        assert not subscription.closed.is_set()
        bus.close()
        assert subscription.closed.wait(PATIENCE_S)
        assert "no more events" in subscription.error

    await script(go_on)
