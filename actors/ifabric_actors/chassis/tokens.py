"""With which token Vault is asked: one that somebody keeps fresh in a file, or one of an AppRole's login.

**A login's token** is tended at two thirds of its life: renewed where Vault allows that, for a renewal needs no
secret-id (which may be good for one login) and keeps the leases that were given under it; else there is a new login.
When a renewal grants less than half, its maximum is near, and there is a new login too. A token that could not be
renewed or replaced is used until it ends.

**Refused** (403) says two things: the token is over, or its policies forbid what was asked. With a file, it is read
again, and another token is worth another try. With an AppRole the token looks itself up: only when it cannot is there
a login, or every request for a forbidden path would use up a secret-id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

from ifabric.cancellation import cancel_and_wait
from ifabric.clock import Clock
from ifabric_actors.chassis.vault import Failed, Hidden, Lines, read_file

T = TypeVar("T")
#: of a life, after which a token or a lease is renewed
RENEW_AT = 2 / 3
#: after a failure, the next attempt comes no sooner and no later
AGAIN_MIN_S = 1.0
AGAIN_MAX_S = 30.0


def again_at(now: float, until: float) -> float:
    """When to try again what has failed and is needed before `until`."""
    return now + min(AGAIN_MAX_S, max(AGAIN_MIN_S, (until - now) / 3))


class Flights:
    """Work that several wait for and that is done once; whoever is cancelled leaves it to the others."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}

    async def join(self, key: Hashable, make: Callable[[], Coroutine[Any, Any, T]]) -> T | Failed:
        """What the work under way for this key gives, or else what `make` gives."""
        task = self._tasks.get(key)
        if task is None:
            task = asyncio.create_task(make(), name=f"vault {key}")
            self._tasks[key] = task
            task.add_done_callback(lambda _: self._tasks.pop(key))
        await asyncio.wait({task})
        if task.cancelled():
            return Failed("The daemon is stopping: Vault is not asked any more.")
        found: T = task.result()
        return found

    async def stop(self, within_s: float) -> None:
        """Lets what is under way end, within that time."""
        if self._tasks:
            await asyncio.wait(set(self._tasks.values()), timeout=within_s)
        await cancel_and_wait(*self._tasks.values())


class Token:
    """A token. Times in seconds on the clock's monotonic scale; without an end, infinite."""

    __slots__ = ("due", "held", "renewable", "ttl_s", "until")

    def __init__(self, held: Hidden[str], now: float, ttl_s: float = 0.0, *, renewable: bool = False) -> None:
        self.held = held
        self.renewable = renewable
        self.ttl_s = ttl_s
        self.begin(now, ttl_s)

    def begin(self, now: float, ttl_s: float) -> None:
        """It was given so much more time. 0: it has no end."""
        self.until = now + ttl_s if ttl_s > 0 else float("inf")
        self.due = now + ttl_s * RENEW_AT if ttl_s > 0 else float("inf")


class TokenFile:
    """The token in a file."""

    def __init__(self, path: str, clock: Clock) -> None:
        self._path, self._clock = path, clock
        self._token: Token | None = None
        #: for sentences
        self.name = f"the token in {path}"

    async def current(self, until: float) -> Token | Failed:
        """The one in the file now."""
        held = read_file(self._path, "Vault's token")
        if isinstance(held, Failed):
            return held
        if self._token is None or self._token.held.open() != held.open():
            self._token = Token(held, self._clock.monotonic())
        return self._token

    async def another(self, refused: Token, until: float) -> Token | Failed | None:
        """One that replaces it. None: there is none."""
        token = await self.current(until)
        return None if token is refused else token

    async def tend(self, until: float) -> None:
        """Whoever writes the file does that."""

    async def end(self, until: float) -> None:
        """It is not ours to end."""


class AppRole:
    """The token of a login with a role-id and a secret-id from two files, which are read at each login."""

    def __init__(self, config: Any, lines: Lines, clock: Clock, log: Any) -> None:
        self._role, self._secret = config.vault_role_id_path, config.vault_secret_id_path
        self._lines, self._clock, self._log = lines, clock, log
        self._flights = Flights()
        self._token: Token | None = None
        self.name = f"the AppRole in {self._role} and {self._secret}"

    async def current(self, until: float) -> Token | Failed:
        """The one there is, tended when that is due."""
        token = self._token
        if token is not None and self._clock.monotonic() < token.due:
            return token
        return await self._flights.join("login", lambda: self._tended(until))

    async def another(self, refused: Token, until: float) -> Token | Failed | None:
        """One that replaces it. None: it is good, and what it was refused for is forbidden."""
        found = await self._flights.join("login", lambda: self._replaced(refused, until))
        return None if found is refused else found

    async def tend(self, until: float) -> None:
        """Renews or replaces the token, when there is one and it is due. One that is over is for who needs it next."""
        if self._token is not None and self._clock.monotonic() < self._token.until:
            await self.current(until)

    async def end(self, until: float) -> None:
        """Revokes the token, and so whatever was given under it."""
        await self._flights.stop(0.0)
        token, self._token = self._token, None
        if token is not None:
            await self._lines.ask(lambda client: client.auth.token.revoke_self(), token.held, until)

    async def _tended(self, until: float) -> Token | Failed:
        token, now = self._token, self._clock.monotonic()
        if token is None or now >= token.until:
            return await self._logged_in(until)
        if token.renewable and await self._renewed(token, until):
            return token
        found = await self._logged_in(until)
        if isinstance(found, Failed):
            token.due = again_at(now, token.until)
            self._log.warning("Vault's token is not renewed", why=found.why, ends_in_s=round(token.until - now))
            return token
        return found

    async def _renewed(self, token: Token, until: float) -> bool:
        """Whether it was renewed, and for long enough to stay with it."""
        now = self._clock.monotonic()
        answer = await self._lines.ask(lambda client: client.auth.token.renew_self(), token.held, until)
        ttl_s = 0.0 if isinstance(answer, Failed) else seconds_of(answer, "auth")
        if ttl_s <= 0:
            return False
        token.begin(now, ttl_s)
        return ttl_s * 2 >= token.ttl_s

    async def _replaced(self, refused: Token, until: float) -> Token | Failed:
        """Another token; the same when it is good."""
        if self._token is not refused:
            return self._token or await self._logged_in(until)
        known = await self._lines.ask(lambda client: client.auth.token.lookup_self(), refused.held, until)
        if not isinstance(known, Failed):
            return refused
        if known.status != 403:
            return Failed(known.why)
        self._token = None
        return await self._logged_in(until)

    async def _logged_in(self, until: float) -> Token | Failed:
        role, secret = read_file(self._role, "the role-id"), read_file(self._secret, "the secret-id")
        if isinstance(role, Failed):
            return role
        if isinstance(secret, Failed):
            return secret
        now = self._clock.monotonic()
        answer = await self._lines.ask(
            lambda client: client.auth.approle.login(role.open(), secret.open(), use_token=False), None, until
        )
        if isinstance(answer, Failed):
            refused = answer.status in (400, 401, 403)
            # without the status: it is not that of what the token is for
            return Failed(f"{self._lines.where} refuses {self.name}." if refused else answer.why)
        token = _token_of(answer, now)
        if isinstance(token, Token):
            self._token = token
            self._log.info("logged in to Vault", ttl_s=token.ttl_s, renewable=token.renewable)
        return token


def seconds_of(answer: Hidden[dict[str, Any]], part: str | None = None) -> float:
    """The `lease_duration` of an answer, or of a part of it; 0 when it is not there."""
    found = answer.open() if part is None else answer.open().get(part)
    seconds = found.get("lease_duration") if isinstance(found, dict) else None
    return float(seconds) if isinstance(seconds, int | float) else 0.0


def _token_of(answer: Hidden[dict[str, Any]], now: float) -> Token | Failed:
    given: Hidden[Any] = Hidden(answer.open().get("auth"))
    if not (isinstance(given.open(), dict) and isinstance(given.open().get("client_token"), str)):
        return Failed("Vault's answer to the login holds no token.")
    held = Hidden(given.open()["client_token"])
    return Token(held, now, seconds_of(answer, "auth"), renewable=given.open().get("renewable") is True)
