"""The only way out of a sandbox: a guest's request, checked, sent with what it may not know, and its response.

**In this order**, so that nothing is spent on what is refused: the request is read; the run was granted the endpoint,
and the endpoint allows it (`outbound`); the run has calls left, and the endpoint's rate; there is a secret; the breaker
admits it; there is a connection to an address that was checked (`dialing`); the run's claim is still held. Only then
is the credential put beside the guest's headers, and the request written. A redirect goes the same way from the
connection on, and never leaves the endpoint's origin, so nor does the secret.

**The fence** goes with each request (`X-Ifabric-Task`, `X-Ifabric-Fence`): between the look at the claim and the
endpoint's doing there is a moment in which the claim may be lost, and only the endpoint can close that.

**Two ways to fail.** What the guest brought about by reaching too far ends its run: `EgressDenied`, and `ClaimLost`.
What just happened (a breaker, a rate, a network) it is told, as `{"error": {...}}`, and it goes on.

**Time.** One timeout is around all of it, whatever trickles: the endpoint's, or what the run has left. When it was the
run's, the endpoint is not blamed: a guest with a millisecond to live would else open the breaker for everybody.

**What may be sent twice.** A connection that was kept may have been closed just now. When nothing of a response has
come over it, a request that may be repeated (RFC 9110, 9.2.2) is sent once more over a new one; any other is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric.errors import (
    BadRequest,
    BreakerOpen,
    ClaimLost,
    EgressDenied,
    FabricError,
    Overloaded,
    SessionLost,
    TooLarge,
    Unavailable,
)
from ifabric.wire.governor import Verdict
from ifabric_actors.chassis import breaking, outbound
from ifabric_actors.chassis.dialing import KEEPALIVE_S, Broken, Connection, Dialer, Resolve, contexts
from ifabric_actors.chassis.outbound import Head, Sending
from ifabric_actors.chassis.routes import Bucket, Route, route

if TYPE_CHECKING:
    from ifabric.metrics import Metrics

#: a larger response is scrubbed in a thread: the loop has others to serve
THREAD_FROM_BYTES = 256 * 1024
#: reports that are under way at `stop` have so long
STOP_S = 2.0
IDEMPOTENT = ("GET", "HEAD", "PUT", "DELETE")


class Secret(Protocol):
    """A header's value. `forms` are what it may come back as, the longest first."""

    def reveal(self) -> str: ...

    def forms(self) -> tuple[bytes, ...]: ...


class Secrets(Protocol):
    """Where credentials come from."""

    async def header(self, credential: Any) -> Secret:
        """The secret that a `Credential` of the configuration names. `Unavailable(what="vault")`."""


class Breakers(Protocol):
    """The breakers in front of endpoints."""

    async def admit(self, name: str, session: str) -> str:
        """A permit. `BreakerOpen`, `Unavailable(what="governor")`."""

    async def report(
        self,
        name: str,
        session: str,
        permit: str,
        outcome: Verdict,
        *,
        latency_s: float,
        retry_after_s: float | None = None,
    ) -> None:
        """How the call went. Never raises."""


@dataclass
class Outgoing:
    """One run's standing towards the outside. The counters are brought up to date by each call, also by a failed one."""

    run: str
    session: str
    task: str | None
    fence: int | None
    endpoints: frozenset[str]
    #: on the clock's monotonic scale
    deadline: float
    #: raises `ClaimLost` when the run's claim is not held any more
    claim: Callable[[], Awaitable[None]] | None = None
    calls: int = 0
    #: requests without what the chassis adds in secret, and responses as they came
    bytes_out: int = 0
    bytes_in: int = 0
    #: calls by endpoint
    made: dict[str, int] = field(default_factory=dict)


@dataclass
class _Course:
    """How a call goes, for the breaker and for whoever is told of its failure."""

    verdict: Verdict = "ignored"
    retry_after_s: float | None = None
    #: who is waited for
    at: str = "vault"
    #: a connection that was kept turned out to be closed
    stale: bool = False
    permit: str | None = None
    began: float = 0.0


class _Place:
    """An endpoint with all that is kept for it."""

    def __init__(self, route: Route, dialer: Dialer, bucket: Bucket) -> None:
        self.route, self.dialer, self.bucket = route, dialer, bucket


class Egress:
    """Carries out the requests of guests. `call` may be called by many at once."""

    def __init__(
        self,
        endpoints: Mapping[str, Any],
        secrets: Secrets | None,
        breakers: Breakers,
        clock: Clock,
        metrics: Metrics,
        resolve: Resolve | None = None,
    ) -> None:
        """`endpoints` are `Endpoint`s of the configuration by name. `ConfigError` when one cannot be used."""
        self._secrets, self._breakers, self._clock = secrets, breakers, clock
        routes = [route(name, endpoint) for name, endpoint in endpoints.items()]
        tls = contexts(routes)
        now = clock.monotonic()
        self._places = {
            one.name: _Place(one, Dialer(one, tls[one.name], resolve), Bucket(one.calls_per_second, now))
            for one in routes
        }
        self._outcomes = {
            outcome: metrics.counter("if_chassis_egress_calls_total", outcome=outcome)
            for outcome in ("done", "denied", "breaker_open", "rate", "failed", "claim_lost")
        }
        self._bytes = {
            direction: metrics.counter("if_chassis_egress_bytes_total", direction=direction)
            for direction in ("out", "in")
        }
        self._seconds = metrics.histogram("if_chassis_egress_seconds")
        self._sweeper: asyncio.Task[None] | None = None
        self._reports: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def start(self) -> None:
        """Connects to nobody: that waits for the first call."""
        if self._sweeper is None and not self._stopped:
            self._sweeper = asyncio.create_task(self._sweep(), name="egress: idle connections")

    async def stop(self) -> None:
        """Closes all connections: calls under way fail."""
        self._stopped = True
        for place in self._places.values():
            place.dialer.close()
        if self._sweeper is not None:
            await cancel_and_wait(self._sweeper)
        if self._reports:
            _, late = await asyncio.wait(self._reports, timeout=STOP_S)
            await cancel_and_wait(*late)

    async def _sweep(self) -> None:
        """Never returns: connections that nobody uses are closed."""
        while True:
            await self._clock.sleep(KEEPALIVE_S)
            for place in self._places.values():
                place.dialer.sweep()

    async def prepare(self, out: Outgoing) -> None:
        """Before a run: `BadRequest` for an endpoint that is not there, `Unavailable` without one's secret."""
        for name in sorted(out.endpoints):
            place = self._places.get(name)
            if place is None:
                known = ", ".join(sorted(self._places)) or "none"
                raise BadRequest(f"there is no endpoint {name}; there is {known}; nothing was run", endpoint=name)
            await self._secret(place.route)

    async def call(self, request: bytes, out: Outgoing) -> bytes:
        """The answer to a guest, in JSON. `EgressDenied` and `ClaimLost` (or `SessionLost`) end its run."""
        began = self._clock.monotonic()
        outcome, bytes_out, bytes_in = "failed", out.bytes_out, out.bytes_in
        try:
            answer = await self._carry_out(outbound.parse(request), out)
            outcome = "done"
        except EgressDenied:
            outcome = "denied"
            raise
        except (ClaimLost, SessionLost):
            outcome = "claim_lost"
            raise
        except (BreakerOpen, Overloaded) as refusal:
            outcome = "breaker_open" if isinstance(refusal, BreakerOpen) else "rate"
            answer = msgspec.json.encode(refusal.to_body())
        except (BadRequest, TooLarge, Unavailable) as refusal:
            answer = msgspec.json.encode(refusal.to_body())
        finally:
            self._outcomes[outcome].inc()
            self._seconds.observe(self._clock.monotonic() - began)
            self._bytes["out"].inc(out.bytes_out - bytes_out)
            self._bytes["in"].inc(out.bytes_in - bytes_in)
        return answer

    async def _carry_out(self, ask: outbound.Ask, out: Outgoing) -> bytes:
        place = self._places.get(ask.endpoint) if ask.endpoint in out.endpoints else None
        if place is None:
            raise EgressDenied(
                f"the run was not given an endpoint {ask.endpoint[:64]!a}; it was ended",
                host=ask.endpoint[:64],
                why="endpoint that the run was not given",
            )
        route = place.route
        sending = outbound.checked(ask, route)
        made = out.made.get(route.name, 0)
        if made >= route.calls_per_run:
            raise outbound.denied(route, f"more than {route.calls_per_run} calls of one run")
        again_in_s = place.bucket.take(self._clock.monotonic())
        if again_in_s > 0:
            raise Overloaded(
                f"the endpoint {route.name} is called {route.calls_per_second:g} times a second already",
                what="endpoint",
                endpoint=route.name,
                again_in_s=round(again_in_s, 3),
            )
        out.made[route.name] = made + 1
        out.calls += 1
        return await self._timed(place, sending, out)

    async def _timed(self, place: _Place, sending: Sending, out: Outgoing) -> bytes:
        """All that waits for somebody, within the time that there is; and the report of how it went."""
        route, course = place.route, _Course()
        left_s = out.deadline - self._clock.monotonic()
        if left_s <= 0 or self._stopped:
            what = "deadline" if left_s <= 0 else "egress"
            raise Unavailable("the run has no time left" if left_s <= 0 else "the chassis is stopping", what=what)
        try:
            async with asyncio.timeout(min(route.timeout_s, left_s)):
                return await self._called(place, sending, out, course)
        except TimeoutError:
            raise _out_of_time(route, course, of_the_run=left_s < route.timeout_s) from None
        except asyncio.CancelledError:
            course.verdict = "ignored"
            raise
        finally:
            if course.permit is not None:
                self._report(route, out, course)

    def _report(self, route: Route, out: Outgoing, course: _Course) -> None:
        """Sends the report, and waits for nobody: a cancelled call has to be reported, too."""
        assert route.breaker is not None and course.permit is not None, "it was admitted"
        verdict = "ignored" if self._stopped else course.verdict  # then it is us who hung up
        report = self._breakers.report(
            route.breaker,
            out.session,
            course.permit,
            verdict,
            latency_s=self._clock.monotonic() - course.began,
            retry_after_s=course.retry_after_s if verdict == "failure" else None,
        )
        task = asyncio.ensure_future(report)
        self._reports.add(task)
        task.add_done_callback(self._reports.discard)

    async def _called(self, place: _Place, sending: Sending, out: Outgoing, course: _Course) -> bytes:
        """The call itself. No text that comes from here holds the secret."""
        route = place.route
        secret = await self._secret(route)
        forms = () if secret is None else secret.forms()
        try:
            if route.breaker is not None:
                course.at = "governor"
                course.permit = await self._breakers.admit(route.breaker, out.session)
                course.began = self._clock.monotonic()
            head, body = await self._followed(place, sending, secret, out, course)
        except FabricError as error:
            facts = outbound.scrubbed(error.facts, forms)
            raise type(error)(outbound.scrubbed(error.message, forms), **facts) from None
        course.at = "scrubber"
        if len(body) < THREAD_FROM_BYTES:
            return outbound.answer(head, body, forms)
        return await asyncio.to_thread(outbound.answer, head, body, forms)

    async def _secret(self, route: Route) -> Secret | None:
        if route.credential is None:
            return None
        if self._secrets is None:
            raise Unavailable(f"there is no Vault for the credential of the endpoint {route.name}", what="vault")
        secret = await self._secrets.header(route.credential)
        if not outbound.is_value(secret.reveal()):
            raise Unavailable(f"the credential of the endpoint {route.name} is not a header's value", what="vault")
        return secret

    async def _followed(
        self, place: _Place, sending: Sending, secret: Secret | None, out: Outgoing, course: _Course
    ) -> tuple[Head, bytes]:
        """The response, after so many redirects as the endpoint allows; one more is the response."""
        for left in range(place.route.redirects_max, -1, -1):
            head, body = await self._sent(place, sending, secret, out, course)
            further = outbound.redirected(sending, place.route, head) if left else None
            if further is None:
                break
            sending = further
        return head, body

    async def _sent(
        self, place: _Place, sending: Sending, secret: Secret | None, out: Outgoing, course: _Course
    ) -> tuple[Head, bytes]:
        """One request and its response, over a connection that was kept or over a new one."""
        route, dialer = place.route, place.dialer
        course.at = "slot"
        async with dialer.slots:
            while True:
                course.at = "endpoint"
                try:
                    connection = (dialer.kept() if not course.stale else None) or await dialer.dial()
                except Unavailable:
                    course.verdict = "failure"
                    raise
                try:
                    if out.claim is not None:
                        course.at = "claim"
                        await out.claim()
                        course.at = "endpoint"
                    return await self._exchanged(connection, route, sending, secret, out, course)
                except Broken:
                    if connection.is_stale and not course.stale and sending.method in IDEMPOTENT:
                        course.stale = True
                        continue
                    course.verdict = "failure"
                    raise
                finally:
                    dialer.give_back(connection)

    async def _exchanged(
        self,
        connection: Connection,
        route: Route,
        sending: Sending,
        secret: Secret | None,
        out: Outgoing,
        course: _Course,
    ) -> tuple[Head, bytes]:
        """Writes the request, the credential with it, and reads the response, as far as the endpoint allows."""
        headers = outbound.stamped(sending, route, run=out.run, task=out.task, fence=out.fence)
        out.bytes_out += outbound.size(sending, headers)
        if secret is not None:
            headers.append((route.credential.header.encode("ascii"), secret.reveal().encode("ascii")))

        def heard(head: Head) -> None:
            course.verdict = breaking.verdict(head.status)
            course.retry_after_s = breaking.retry_after_s(head.all(b"retry-after"), self._clock.wall_ms())
            outbound.refuse_encoded(head, route)

        try:
            return await connection.exchange(sending, headers, heard)
        finally:
            out.bytes_in += connection.taken


def _out_of_time(route: Route, course: _Course, *, of_the_run: bool) -> FabricError:
    """Why a call ended before its time; and the endpoint's failure, when it had all of it."""
    if course.at == "slot":
        return Overloaded(f"no connection to the endpoint {route.name} was free", what="endpoint", endpoint=route.name)
    if of_the_run:
        course.verdict = "failure" if course.verdict == "failure" else "ignored"
        return Unavailable("the run's time was up before the call was done", what="deadline")
    if course.at != "endpoint":
        return Unavailable(f"the call waited too long for the {course.at}", what=course.at)
    course.verdict = "failure"
    return Unavailable(
        f"the endpoint {route.name} did not answer within {route.timeout_s:g} s", what="endpoint", why="timeout"
    )
