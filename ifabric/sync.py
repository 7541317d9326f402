"""The SDK without `await`: for scripts, notebooks and the runbook.

`SyncClient` and what it gives are in `ifabric.blocking`. `EventBus` and `Coordinator` are the names that the runbook's
inline scripts use; they work after a change of the import.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from ifabric.blocking import START_S, Background, SyncBreaker, SyncClaim, SyncClient, SyncHold
from ifabric.client import Client
from ifabric.errors import ClaimLost, ClaimTaken, Conflict, FabricError, NotClaimable, UnknownTask
from ifabric.wire import coordinator as wire

__all__ = [
    "Background",
    "Coordinator",
    "EventBus",
    "Subscription",
    "SyncBreaker",
    "SyncClaim",
    "SyncClient",
    "SyncHold",
]

LOG = logging.getLogger("ifabric")


class EventBus:
    """The connection of the runbook's scripts: ``EventBus('etcd', {...})``.

    The daemon is found by ``config["nats"]``, ``$IFABRIC_NATS`` or this machine's endpoints.json, and each request is
    tried for ``config["timeout_seconds"]`` (default 5). etcd's endpoints
    and certificates in the config are accepted and not used: only the daemon talks to etcd, and no agent ever holds
    its credentials. A script that ends without `close` is closed by the interpreter.
    """

    def __init__(self, backend: str = "etcd", config: Mapping[str, Any] | None = None) -> None:
        if backend not in ("etcd", "nats"):
            raise ValueError(f"there is no backend {backend!r}; the fabric is 'etcd' behind NATS")
        given = config or {}
        self._nats = ",".join(given["nats"]) if isinstance(given.get("nats"), list | tuple) else given.get("nats")
        self._state_dir = Path(given["state_dir"]) if "state_dir" in given else None
        self._timeout_s = float(given.get("timeout_seconds", 5.0))
        self._sessions: dict[str, SyncClient] = {}
        self._lock = threading.Lock()
        self.error = ""

    def connect(self) -> bool:
        """Whether a daemon answers, and etcd behind it; if not, `error` says why."""
        try:
            self.session("runbook").list(limit=1)
        except FabricError as error:
            self.error = error.message
            return False
        self.error = ""
        return True

    def session(self, name: str) -> SyncClient:
        """The client of that session, kept and renewed until `close`."""
        with self._lock:
            if name not in self._sessions:
                client = SyncClient(self._nats, session=name, state_dir=self._state_dir, timeout_s=self._timeout_s)
                self._sessions[name] = client.__enter__()
                atexit.register(self.close)
            return self._sessions[name]

    def close(self) -> None:
        """Ends every session. Twice is harmless."""
        atexit.unregister(self.close)
        with self._lock:
            sessions, self._sessions = self._sessions, {}
        for client in sessions.values():
            client.__exit__(None, None, None)


class Subscription:
    """A callback that is told of events until `close`, on a thread of its own, so that it may take its time and call
    the fabric.

    A callback that raises is logged and told of the next event: one bad event must not make a script deaf. `failures`
    counts that. While NATS or the daemon is away nothing comes, and then it goes on. When the connection closes for
    good, `closed` is set and `error` says why.
    """

    def __init__(self, client: SyncClient, callback: Callable[[dict[str, Any]], None]) -> None:
        self.failures = 0
        self.error = ""
        self.closed = threading.Event()
        self._callback = callback
        self._events: queue.SimpleQueue[wire.TaskEvent | None] = queue.SimpleQueue()
        ready: Future[None] = Future()
        self._future = client._background.start(self._follow(client._client, ready))  # noqa: SLF001  its own kind
        ready.result(START_S)
        self._thread = threading.Thread(target=self._call, name="ifabric events", daemon=True)
        self._thread.start()

    async def _follow(self, client: Client, ready: Future[None]) -> None:
        try:
            async with client.subscribe() as events:
                ready.set_result(None)
                async for event in events:
                    self._events.put(event)
        except FabricError as error:
            self.error = error.message
            if not ready.done():
                ready.set_exception(error)
        finally:
            self._events.put(None)

    def _call(self) -> None:
        while (event := self._events.get()) is not None and not self.closed.is_set():
            try:
                self._callback(msgspec.to_builtins(event))
            except Exception:
                self.failures += 1
                LOG.exception("the callback failed on the event %s of task %s", event.event, event.task)
        self.closed.set()

    def close(self) -> None:
        """No call begins after this. Twice is harmless."""
        self.closed.set()
        self._future.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(START_S)


class Coordinator:
    """The runbook's calls, one for one."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus

    def claim_task(self, task: str, session: str) -> bool:
        """Whether the session holds the task now. A task that nobody has submitted is submitted first.

        False when somebody else holds it, or it is done, blocked, dead or cancelled.
        """
        client = self._bus.session(session)
        while True:
            try:
                client.claim(task)
            except UnknownTask:
                with contextlib.suppress(Conflict):  # somebody was faster
                    client.submit([wire.TaskSpec(id=task)])
            except (ClaimTaken, NotClaimable):
                return False
            else:
                return True

    def release_task(self, task: str, session: str) -> bool:
        """Whether the session held the task and gave it back."""
        return self._end(task, session, "release")

    def complete_task(self, task: str, session: str, result: Any = None) -> bool:
        """Whether the session held the task and completed it."""
        return self._end(task, session, "complete", result)

    def fail_task(self, task: str, session: str, error: str = "failed") -> bool:
        """Whether the session held the task and failed it."""
        return self._end(task, session, "fail", error)

    def _end(self, task: str, session: str, how: str, *arguments: Any) -> bool:
        client = self._bus.session(session)
        held = client._client.claims.get(task)  # noqa: SLF001  its own kind
        try:
            if held is not None:
                getattr(SyncClaim(client._background, held), how)(*arguments)  # noqa: SLF001
                return True
            found = client.get(task)  # the same session may have claimed it elsewhere
            if found.session == session:
                client._background.run(getattr(client._client, how)(task, found.fence, *arguments))  # noqa: SLF001
            return found.session == session
        except (ClaimLost, UnknownTask):
            return False

    def get_task(self, task: str) -> dict[str, Any]:
        """The task as plain data."""
        found: dict[str, Any] = msgspec.to_builtins(self._bus.session("runbook").get(task))
        return found

    def subscribe_task_updates(self, callback: Callable[[dict[str, Any]], None]) -> Subscription:
        """Calls back with every task event from now on, as plain data."""
        return Subscription(self._bus.session("runbook"), callback)
