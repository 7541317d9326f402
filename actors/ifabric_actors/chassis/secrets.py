"""The secrets of endpoints: from Vault, believed for a while, and shown to nobody but the one call that needs them.

**A secret without a lease** (KV) is believed for `cache_seconds`: so long may one that was changed or taken away still
be used. **One with a lease** (a dynamic secret) is good for its lease, or for the life of the token that it was given
under, for Vault takes both away together. It is renewed at two thirds of that; where Vault says no, or grants less than
half, which is how the maximum of a lease announces itself, another is read in its place. The one before it is left
alone until it ends, since calls may be under way with it. At `stop` all are revoked.

**Without Vault** what is cached goes on for as long as it is good, and nothing else does.

**What cannot be known.** A read that was given up may have made a lease that nobody holds: it ends by itself.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, final
from urllib.parse import quote

from ifabric.actor.dependencies import Dependencies
from ifabric.clock import Clock
from ifabric.errors import Unavailable
from ifabric_actors.chassis.scrub import forms_of
from ifabric_actors.chassis.tokens import RENEW_AT, AppRole, Flights, Token, TokenFile, again_at, seconds_of
from ifabric_actors.chassis.vault import Answer, Call, Failed, Guarded, Hidden, Lines

if TYPE_CHECKING:
    from ifabric.metrics import Metrics

#: how often leases are looked at: Vault's own grain is a second
TICK_S = 1.0
#: names of fields in a sentence
NAMES_MAX = 20


@final
class Secret(Guarded):
    """A header's value. `reveal` is the only way to it."""

    __slots__ = ("_forms", "_name", "_value", "_whole")

    def __init__(self, name: str, value: str, format: str) -> None:
        self._name, self._value, self._whole = name, value, format.replace("{}", value)
        self._forms: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        return f"Secret({self._name})"

    def reveal(self) -> str:
        """All of the header's value."""
        return self._whole

    def forms(self) -> tuple[bytes, ...]:
        """What a scrubber looks for, the longest first: see `forms_of`."""
        if not self._forms:
            self._forms = forms_of(self._value, self._whole)
        return self._forms


class _Entry:
    """What was read at one path. Times on the clock's monotonic scale."""

    __slots__ = ("_until", "due", "fields", "lease", "lease_s", "path", "renewable", "secrets", "token")

    def __init__(self, path: str, fields: Hidden[dict[str, Any]], token: Token, until: float) -> None:
        self.path, self.fields, self.token, self._until = path, fields, token, until
        #: None: without a lease
        self.lease: Hidden[str] | None = None
        self.lease_s = 0.0
        self.due = float("inf")
        self.renewable = False
        self.secrets: dict[tuple[str, str], Secret] = {}

    def begin(self, now: float, lease_s: float) -> None:
        """The lease was given so much time."""
        self._until = now + lease_s
        self.due = now + (self.until - now) * RENEW_AT

    @property
    def until(self) -> float:
        """Until when it is good."""
        return min(self._until, self.token.until)


class Vault:
    """Headers with secrets in them. `keep` is a task of the actor's."""

    def __init__(
        self, config: Any, clock: Clock, metrics: Metrics, log: Any, dependencies: Dependencies | None = None
    ) -> None:
        """`config` is the section `chassis.credentials`; `dependencies` are told of how Vault is."""
        self._config, self._clock, self._log = config, clock, log
        self._dependencies = Dependencies() if dependencies is None else dependencies
        self._lines = Lines(config, metrics)
        self._login: TokenFile | AppRole = (
            AppRole(config, self._lines, clock, log)
            if config.vault_role_id_path is not None
            else TokenFile(config.vault_token_path, clock)
        )
        self._flights = Flights()
        self._entries: dict[str, _Entry] = {}
        #: leases that another has taken the place of
        self._former: list[_Entry] = []
        self._leases = metrics.gauge("if_chassis_vault_leases")
        #: why Vault cannot be asked; None while it can, whatever it answers
        self.trouble: str | None = None

    async def start(self) -> None:
        """Asks nothing: Vault may be down when the daemon starts."""

    async def stop(self) -> None:
        """Revokes leases, and the token if it is of a login of ours, within `timeout_seconds`."""
        until = self._until()
        try:
            await self._flights.stop(self._config.timeout_seconds / 2)
            token = await self._login.current(until) if self._live() else None
            if isinstance(token, Token):
                await asyncio.gather(*(self._revoke(entry, token, until) for entry in self._live()))
            elif token is not None:
                self._log.warning("leases are not revoked", count=len(self._live()), why=token.why)
            await self._login.end(until)
        finally:
            self._entries.clear()
            self._former.clear()
            self._leases.set(0)
            self._lines.close()

    async def header(self, credential: Any) -> Secret:
        """The secret that a `Credential` of the configuration names. `Unavailable` when there is none to be had."""
        path = credential.vault_path.strip("/")
        entry: _Entry | Failed | None = self._entries.get(path)
        if not isinstance(entry, _Entry) or self._clock.monotonic() >= entry.until:
            entry = await self._flights.join(path, partial(self._fetch, path))
        secret = entry if isinstance(entry, Failed) else _secret(entry, credential)
        if isinstance(secret, Failed):
            raise Unavailable(secret.why, what="vault", path=path)
        return secret

    async def keep(self) -> None:
        """Never returns: keeps leases and the token alive, and forgets what is over."""
        while True:
            await self._clock.sleep(TICK_S)
            self._forget()
            await self._login.tend(self._until())  # first: a lease ends with its token
            now = self._clock.monotonic()
            await asyncio.gather(*(self._renew(entry) for entry in self._entries.values() if now >= entry.due))

    # -- asking ---------------------------------------------------------------------------------------------------------

    def _until(self) -> float:
        """When a request that begins now is given up, on the loop's clock."""
        timeout_s: float = self._config.timeout_seconds
        return asyncio.get_running_loop().time() + timeout_s

    async def _ask(self, call: Call, until: float) -> tuple[Answer | Failed, Token | None]:
        """What Vault answers, and to which token: one that is refused is replaced once."""
        token = await self._login.current(until)
        if isinstance(token, Failed):
            return self._heard(token), None
        answer = await self._lines.ask(call, token.held, until)
        if isinstance(answer, Failed) and answer.status == 403:
            other = await self._login.another(token, until)
            if isinstance(other, Failed):
                return self._heard(other), None
            if other is None:
                return self._heard(Failed(f"{answer.why[:-1]} for this: {self._login.name}.", 403)), None
            token, answer = other, await self._lines.ask(call, other.held, until)
        return self._heard(answer), token

    def _heard(self, answer: Answer | Failed) -> Answer | Failed:
        why = answer.why if isinstance(answer, Failed) and answer.is_down else None
        if (why is None) != (self.trouble is None):
            self._log.warning("Vault is not to be had", why=why) if why else self._log.info("Vault answers again")
        self.trouble = why
        self._dependencies.report("vault", why, self._clock.monotonic())
        return answer

    async def _fetch(self, path: str) -> _Entry | Failed:
        """Reads what is at the path, in the place of what was."""
        began = self._clock.monotonic()
        answer, token = await self._ask(lambda client: client.read(quote(path, safe="/")), self._until())
        if isinstance(answer, Failed):
            if answer.status == 404:
                return Failed(f"{path} is not in Vault: it was never written, or it was deleted.", 404)
            return Failed(f"{path} could not be read. {answer.why}", answer.status)
        assert token is not None
        entry = _entry(path, answer, token, began, self._config.cache_seconds)
        if isinstance(entry, _Entry):
            before = self._entries.get(path)
            if before is not None and before.lease is not None:
                self._former.append(before)
            self._entries[path] = entry
            self._leases.set(sum(one.lease is not None for one in self._entries.values()))
        return entry

    # -- leases ---------------------------------------------------------------------------------------------------------

    def _live(self) -> list[_Entry]:
        now = self._clock.monotonic()
        return [one for one in (*self._entries.values(), *self._former) if one.lease is not None and now < one.until]

    def _forget(self) -> None:
        now = self._clock.monotonic()
        self._former = [entry for entry in self._former if now < entry.until]
        self._entries = {path: entry for path, entry in self._entries.items() if now < entry.until}
        self._leases.set(sum(one.lease is not None for one in self._entries.values()))

    async def _renew(self, entry: _Entry) -> None:
        """Gives the lease more time, or reads another secret in its place."""
        path, until = entry.path, self._until()
        if entry.renewable and self._clock.monotonic() < entry.token.due:
            began = self._clock.monotonic()
            lease, lease_s = entry.lease, int(entry.lease_s)
            assert lease is not None
            answer, _ = await self._ask(lambda client: client.sys.renew_lease(lease.open(), lease_s), until)
            if not isinstance(answer, Failed):
                granted_s = seconds_of(answer)
                if granted_s > 0:
                    entry.begin(began, granted_s)
                if granted_s * 2 >= entry.lease_s:
                    return
            elif answer.is_down:
                self._put_off(entry, answer)
                return
            elif answer.status in (400, 404) and self._entries.get(path) is entry:
                del self._entries[path]  # it is no lease any more, and what came with it no secret
                self._log.warning("a lease ended before its time", path=path, why=answer.why)
        found = await self._flights.join(path, partial(self._fetch, path))
        if isinstance(found, Failed):
            self._put_off(entry, found)

    def _put_off(self, entry: _Entry, failed: Failed) -> None:
        now = self._clock.monotonic()
        entry.due = again_at(now, entry.until)
        self._log.warning(
            "a lease is not renewed", path=entry.path, why=failed.why, ends_in_s=max(0, round(entry.until - now))
        )

    async def _revoke(self, entry: _Entry, token: Token, until: float) -> None:
        lease = entry.lease
        assert lease is not None
        answer = await self._lines.ask(lambda client: client.sys.revoke_lease(lease.open()), token.held, until)
        if isinstance(answer, Failed):
            self._log.warning("a lease is not revoked", path=entry.path, why=answer.why)


# -- reading an answer --------------------------------------------------------------------------------------------------


def _entry(path: str, answer: Answer, token: Token, began: float, cache_s: float) -> _Entry | Failed:
    lease = answer.open().get("lease_id")
    fields: Hidden[Any] = Hidden(answer.open().get("data"))
    if not lease and "/data/" in path and _is_map(fields) and "metadata" in fields.open():
        fields = Hidden(fields.open().get("data"))  # KV v2
    if not _is_map(fields):
        return Failed(f"What Vault has at {path} is no secret: its answer has no map of fields.")
    entry = _Entry(path, fields, token, began + cache_s)
    lease_s = seconds_of(answer)
    if isinstance(lease, str) and lease and lease_s > 0:
        entry.lease, entry.lease_s, entry.renewable = Hidden(lease), lease_s, answer.open().get("renewable") is True
        entry.begin(began, lease_s)
    return entry


def _is_map(fields: Hidden[Any]) -> bool:
    return isinstance(fields.open(), dict)


def _secret(entry: _Entry, credential: Any) -> Secret | Failed:
    """The field of what was read, as the header carries it."""
    key = (credential.field, credential.format)
    if key in entry.secrets:
        return entry.secrets[key]
    name = f"{entry.path}#{credential.field}"
    if credential.field not in entry.fields.open():
        there = sorted(map(str, entry.fields.open()))
        more = f" and {len(there) - NAMES_MAX} more" if len(there) > NAMES_MAX else ""
        has = ", ".join(field[:64] for field in there[:NAMES_MAX]) or "none"
        return Failed(f"{entry.path} in Vault has no field {credential.field}; there is {has}{more}.")
    value = Hidden(entry.fields.open()[credential.field])
    why = _why_no_header(value.open())
    if why is not None:
        return Failed(f"{name} in Vault {why}: a header cannot carry it.")
    secret = entry.secrets[key] = Secret(name, value.open(), credential.format)
    return secret


def _why_no_header(value: Any) -> str | None:
    if not isinstance(value, str):
        return "is not text"
    if not value:
        return "is empty"
    if value.rstrip("\r\n") != value:
        return "ends with a line break"
    if not all(" " <= letter <= "~" for letter in value):
        return "holds something else than printable ASCII"
    return "begins or ends with a space" if value != value.strip() else None
