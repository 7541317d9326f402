"""The SDK without `await`: `SyncClient` runs a `Client` on a loop of its own in a background thread, so that renewals
go on while the script computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from ifabric.breaking import Breaker, Classify
from ifabric.cancellation import cancel_and_wait
from ifabric.claims import Claim
from ifabric.client import Client
from ifabric.errors import FabricError
from ifabric.sandboxing import Module, Result, RunOptions
from ifabric.spending import Hold
from ifabric.wire import chassis, governor
from ifabric.wire import coordinator as wire
from ifabric.wire.envelope import Usage

R = TypeVar("R")
START_S = 10.0


class Background:
    """An event loop on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ifabric", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, R]) -> Future[R]:
        """Runs it there, and does not wait. `FabricError` after `close`."""
        if self._loop.is_closed():
            coroutine.close()
            raise FabricError("the client is closed; nothing was sent")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """Runs it there; returns or raises here."""
        future = self.start(coroutine)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends what runs there, the loop and its thread. Twice is harmless."""
        if not self._loop.is_closed():
            self.run(self._finish())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(START_S)
            self._loop.close()

    async def _finish(self) -> None:
        await cancel_and_wait(*(asyncio.all_tasks() - {asyncio.current_task()}))
        await self._loop.shutdown_asyncgens()


class SyncClaim:
    """A claim, for code without `await`. As a block it ends as `ifabric.Claim` does, but cannot interrupt the body
    when it is lost.
    """

    def __init__(self, background: Background, claim: Claim) -> None:
        self._background = background
        self._claim = claim

    def __getattr__(self, name: str) -> Any:
        return getattr(self._claim, name)

    @property
    def is_lost(self) -> bool:
        """Look now and then: what is brought back under a lost claim is refused."""
        return self._claim.lost.is_set()

    @property
    def cost_micro_usd(self) -> int:
        """What the work has cost so far; add to it. The claim's end tells it."""
        return self._claim.cost_micro_usd

    @cost_micro_usd.setter
    def cost_micro_usd(self, amount: int) -> None:
        self._claim.cost_micro_usd = amount

    def complete(
        self, result: Any = None, *, cost_micro_usd: int | None = None, usage: Usage | None = None
    ) -> wire.CompleteReply:
        """The work is done. Raises `ClaimLost`."""
        return self._background.run(self._claim.complete(result, cost_micro_usd=cost_micro_usd, usage=usage))

    def fail(
        self, error: str, *, retry: bool = True, cost_micro_usd: int | None = None, usage: Usage | None = None
    ) -> wire.FailReply:
        """The attempt failed."""
        failing = self._claim.fail(error, retry=retry, cost_micro_usd=cost_micro_usd, usage=usage)
        return self._background.run(failing)

    def release(self, reason: str = "") -> wire.StateReply:
        """Gives the task back."""
        return self._background.run(self._claim.release(reason))

    def hold(self, amount_micro_usd: int, *, step: str | None = None, ttl_s: int | None = None) -> SyncHold:
        """An amount set aside for one step of the work; see `ifabric.Claim.hold`."""
        return SyncHold(self._background, self._claim.hold(amount_micro_usd, step=step, ttl_s=ttl_s))

    def run(
        self, module: Module, *args: str, hold: SyncHold | str | None = None, **options: Unpack[RunOptions]
    ) -> Result:
        """Runs WebAssembly for the task, for as long as the claim is held; see `ifabric.Claim.run`."""
        return self._background.run(self._claim.run(module, *args, hold=_held(hold), **options))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._claim.ended or self.is_lost:
            self._background.run(self._claim.settle(error))
            return
        if error is None:
            self.complete()
        else:
            with contextlib.suppress(FabricError):  # the block's own exception is what matters
                if isinstance(error, Exception):
                    self.fail(f"{type(error).__name__}: {error}")
                else:
                    self.release(type(error).__name__)


class SyncHold:
    """A hold, for code without `await`; see `ifabric.spending`."""

    def __init__(self, background: Background, hold: Hold) -> None:
        self._background = background
        self._hold = hold

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hold, name)

    @property
    def cost_micro_usd(self) -> int | None:
        """What it cost: charged when the block is left, however it is left."""
        return self._hold.cost_micro_usd

    @cost_micro_usd.setter
    def cost_micro_usd(self, amount: int | None) -> None:
        self._hold.cost_micro_usd = amount

    @property
    def usage(self) -> Usage | None:
        """What was bought."""
        return self._hold.usage

    @usage.setter
    def usage(self, usage: Usage | None) -> None:
        self._hold.usage = usage

    def commit(self, amount_micro_usd: int, *, usage: Usage | None = None) -> governor.CommitReply:
        """Charges what it cost, and frees the rest."""
        return self._background.run(self._hold.commit(amount_micro_usd, usage=usage))

    def void(self) -> governor.VoidReply:
        """Frees all of it."""
        return self._background.run(self._hold.void())

    def __enter__(self) -> Self:
        self._background.run(self._hold.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.run(self._hold.__aexit__(kind, error, trace))


class SyncBreaker:
    """A call through a breaker, for code without `await`; see `ifabric.breaking`."""

    def __init__(self, background: Background, breaker: Breaker) -> None:
        self._background = background
        self._breaker = breaker
        self.success, self.failure, self.ignored = breaker.success, breaker.failure, breaker.ignored

    def __getattr__(self, name: str) -> Any:
        return getattr(self._breaker, name)

    def __enter__(self) -> Self:
        self._background.run(self._breaker.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._background.run(self._breaker.__aexit__(kind, error, trace))


class SyncClient:
    """`ifabric.Client`, blocking. The arguments are those of `Client.connect`."""

    def __init__(
        self,
        nats: str | None = None,
        *,
        session: str | None = None,
        capabilities: Iterable[str] = (),
        accepts: Iterable[str] = (),
        account: str | None = None,
        ttl_s: int | None = None,
        timeout_s: float = 5.0,
        state_dir: Path | None = None,
        credentials: str | Path | None = None,
        ca: str | Path | None = None,
    ) -> None:
        self._background = Background()

        async def make() -> Client:  # on the loop that it will live on
            return Client.connect(
                nats,
                session=session,
                capabilities=capabilities,
                accepts=accepts,
                account=account,
                ttl_s=ttl_s,
                timeout_s=timeout_s,
                state_dir=state_dir,
                credentials=credentials,
                ca=ca,
            )

        try:
            self._client = self._background.run(make())
        except BaseException:
            self._background.close()
            raise

    def __enter__(self) -> Self:
        try:
            self._background.run(self._client.__aenter__())
        except BaseException:
            self._background.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._background.run(self._client.__aexit__(None, None, None))
        finally:
            self._background.close()

    @property
    def session(self) -> str:
        """Who we are."""
        return self._client.session

    def tasks(
        self, *, wait_s: float = 10.0, until_empty: bool = False, hold_micro_usd: int | None = None
    ) -> Iterator[SyncClaim]:
        """One claim after the other."""
        claims: AsyncIterator[Claim] = self._client.tasks(
            wait_s=wait_s, until_empty=until_empty, hold_micro_usd=hold_micro_usd
        )

        async def step() -> Claim | None:
            return await anext(claims, None)

        while (claim := self._background.run(step())) is not None:
            yield SyncClaim(self._background, claim)

    def claim(self, task: str, *, hold_micro_usd: int | None = None) -> SyncClaim:
        """Takes one task."""
        taking = self._client.claim(task, hold_micro_usd=hold_micro_usd)
        return SyncClaim(self._background, self._background.run(taking))

    def next(self, *, wait_s: float = 0.0, hold_micro_usd: int | None = None) -> SyncClaim:
        """Takes the best task there is."""
        taking = self._client.next(wait_s=wait_s, hold_micro_usd=hold_micro_usd)
        return SyncClaim(self._background, self._background.run(taking))

    def submit(self, tasks: Iterable[wire.TaskSpec | dict[str, Any]], *, done: Iterable[str] = ()) -> wire.SubmitReply:
        """Creates tasks, all or none."""
        return self._background.run(self._client.submit(tasks, done=done))

    def get(self, task: str) -> wire.GetReply:
        """One task with its history."""
        return self._background.run(self._client.get(task))

    def list(self, *, state: wire.State | None = None, limit: int = 100, after: str | None = None) -> wire.ListReply:
        """A page of tasks."""
        return self._background.run(self._client.list(state=state, limit=limit, after=after))

    def cancel(self, task: str) -> wire.StateReply:
        """Takes a task off the board."""
        return self._background.run(self._client.operate(wire.Cancel, task))

    def requeue(self, task: str) -> wire.StateReply:
        """Puts a dead or cancelled task back."""
        return self._background.run(self._client.operate(wire.Requeue, task))

    # -- money and breakers ------------------------------------------------------------------------------------------

    def spend(
        self, amount_micro_usd: int, *, entry: str | None = None, account: str | None = None, usage: Usage | None = None
    ) -> governor.CommitReply:
        """Charges at once what is available, or raises `BudgetShort`."""
        return self._background.run(self._client.spend(amount_micro_usd, entry=entry, account=account, usage=usage))

    def hold(
        self, amount_micro_usd: int, *, name: str | None = None, account: str | None = None, ttl_s: int | None = None
    ) -> SyncHold:
        """An amount set aside for the length of a `with` block."""
        return SyncHold(self._background, self._client.hold(amount_micro_usd, name=name, account=account, ttl_s=ttl_s))

    def balance(self, account: str | None = None, *, tree: bool = False) -> governor.BalanceReply:
        """An account with all above it, and its open holds."""
        return self._background.run(self._client.balance(account, tree=tree))

    def breaker(self, name: str, *, classify: Classify | None = None, wait_s: float = 0.0) -> SyncBreaker:
        """A call to that resource through its breaker: a `with` block."""
        return SyncBreaker(self._background, self._client.breaker(name, classify=classify, wait_s=wait_s))

    # -- sandboxes ---------------------------------------------------------------------------------------------------

    def put_module(self, wasm: bytes | Path) -> str:
        """Keeps a WebAssembly module; its id."""
        return self._background.run(self._client.put_module(wasm))

    def inspect_module(self, module: Module) -> chassis.InspectReply:
        """What is in a module, and why it would be refused."""
        return self._background.run(self._client.inspect_module(module))

    def run_module(
        self,
        module: Module,
        *args: str,
        task: str | None = None,
        fence: int | None = None,
        hold: SyncHold | str | None = None,
        **options: Unpack[RunOptions],
    ) -> Result:
        """Runs a module in a sandbox, to its end; see `ifabric.Client.run_module`. For a claim: `claim.run`."""
        running = self._client.run_module(module, *args, task=task, fence=fence, hold=_held(hold), **options)
        return self._background.run(running)

    def modules(self, *, limit: int = 100, after: str | None = None) -> chassis.ModulesReply:
        """A page of the modules that are kept."""
        return self._background.run(self._client.modules(limit=limit, after=after))

    def runs(self) -> chassis.RunsReply:
        """The runs that have lasted longer than a second."""
        return self._background.run(self._client.runs())

    def kill_run(self, run: str, *, why: str = "") -> chassis.KillReply:
        """Ends a run. For operators."""
        return self._background.run(self._client.kill_run(run, why=why))


def _held(hold: SyncHold | str | None) -> Hold | str | None:
    return hold._hold if isinstance(hold, SyncHold) else hold  # noqa: SLF001  its own kind
