"""Who may look, and who may act: tokens, each the first line of a file of its own.

A file is read again when it has changed, so a token is replaced without a restart; while it has none that is good,
nobody is let in by it. Tokens are compared with every one that there is, in a time that says nothing of them.

**Guessing is slow.** Whoever has failed `FAILURES_MAX` times within `FAILURES_WITHIN_S` is not listened to until some
of that is past, whatever they show. They are told apart by their address: behind a proxy they are one.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import Path

from ifabric.clock import Clock
from ifabric.config_ops import Page
from ifabric.errors import ConfigError, Forbidden, Overloaded, Unauthenticated
from ifabric.wire.subjects import RESERVED_SESSIONS

TOKEN_MIN, TOKEN_MAX = 16, 1024
FAILURES_MAX = 10
FAILURES_WITHIN_S = 60.0
#: addresses whose failures are remembered
ADDRESSES_MAX = 10_000


class TokenFile:
    """A token in a file. `key` is what the configuration calls it."""

    def __init__(self, key: str, path: str) -> None:
        self.key = key
        self._path = Path(path)
        self._version: tuple[int, int, int] | None = None
        self._token = b""
        self._warning = ""
        self.read()

    def read(self) -> bytes:
        """The token as it is now. `ConfigError` says what is wrong with it."""
        try:
            about = self._path.stat()
            version = (about.st_mtime_ns, about.st_size, about.st_ino)
            if version == self._version:
                return self._token
            with self._path.open("rb") as file:
                first = file.readline(TOKEN_MAX + 2).strip()
        except OSError as error:
            self._version = None
            raise ConfigError(f"{self.key}: cannot read {self._path}: {error.strerror}") from None
        self._version = None
        if len(first) < TOKEN_MIN:
            raise ConfigError(
                f"{self.key}: the token in {self._path} has {len(first)} characters; it takes {TOKEN_MIN} or more. "
                f"One that nobody guesses: head -c 24 /dev/urandom | base64"
            )
        if len(first) > TOKEN_MAX or not first.isascii() or b" " in first or not first.decode().isprintable():
            raise ConfigError(
                f"{self.key}: the first line of {self._path} is no token: up to {TOKEN_MAX} printable characters of "
                "ASCII, without spaces"
            )
        self._token, self._version = first, version
        open_to = about.st_mode & 0o077
        self._warning = f"{self.key}: {self._path} is open to others than its owner: chmod 600" if open_to else ""
        return first

    def now(self) -> bytes:
        """The token; b"" while there is none that is good."""
        try:
            return self.read()
        except ConfigError as error:
            self._warning = error.message
            return b""

    @property
    def warning(self) -> str:
        """A sentence about what is wrong with the file; "" when nothing is."""
        self.now()
        return self._warning


class Tokens:
    """Those of the configuration. `ConfigError` names the key of one that is not good."""

    def __init__(self, page: Page, clock: Clock) -> None:
        self._clock = clock
        reserved = sorted(RESERVED_SESSIONS & page.operators.keys())
        if reserved:
            raise ConfigError(f"page.operators.{reserved[0]}: that is a name of the fabric itself; take another")
        self._operators = {name: TokenFile(f"page.operators.{name}", path) for name, path in page.operators.items()}
        viewer = page.viewer_token_file
        self._viewer = TokenFile("page.viewer_token_file", viewer) if viewer is not None else None
        self._refuse_equal()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def _refuse_equal(self) -> None:
        seen: dict[bytes, str] = {}
        for file in self._files():
            other = seen.setdefault(file.read(), file.key)
            if other != file.key:
                raise ConfigError(f"{file.key} has the same token as {other}: it must say who somebody is")

    def _files(self) -> list[TokenFile]:
        return [*self._operators.values(), *([self._viewer] if self._viewer is not None else [])]

    @property
    def guarded(self) -> bool:
        """Whether it takes a token to look."""
        return self._viewer is not None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is wrong with the files, as sentences."""
        return tuple(warning for file in self._files() if (warning := file.warning))

    def look(self, headers: Mapping[str, str], address: str) -> None:
        """Returns when somebody may look: with the viewer's token, or an operator's. Raises as `act`."""
        if self._viewer is None:
            return
        token = self._shown(headers, address)
        if _same(token, self._viewer.now()) or self._operator(token) is not None:
            return
        self._fail(address)
        raise Forbidden("This token is not one to look with; nothing was shown.", what="token")

    def act(self, headers: Mapping[str, str], address: str) -> str:
        """The operator's name. `Unauthenticated` without a token, `Forbidden` with a wrong one, `Overloaded` after too
        many of both.
        """
        token = self._shown(headers, address)
        name = self._operator(token)
        if name is not None:
            return name
        self._fail(address)
        raise Forbidden("This token is no operator's (page.operators); nothing was done.", what="token")

    def _operator(self, token: bytes) -> str | None:
        found = None
        for name, file in self._operators.items():  # all of them: how long it takes is the same for each
            if _same(token, file.now()):
                found = name
        return found

    def _shown(self, headers: Mapping[str, str], address: str) -> bytes:
        failures = self._failures.get(address)
        now = self._clock.monotonic()
        while failures and failures[0] <= now - FAILURES_WITHIN_S:
            failures.popleft()
        if failures and len(failures) >= FAILURES_MAX:
            raise Overloaded(
                f"{FAILURES_MAX} requests from {address} without a good token within a minute; nothing was done. "
                "Try again later.",
                what="token",
                retry_in_s=round(failures[0] + FAILURES_WITHIN_S - now, 1),
            )
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            self._fail(address)
            raise Unauthenticated(
                "This takes a token: the header `Authorization: Bearer TOKEN`; nothing was done.", what="token"
            )
        return token.strip().encode(errors="replace")

    def _fail(self, address: str) -> None:
        failures = self._failures.setdefault(address, deque(maxlen=FAILURES_MAX))
        failures.append(self._clock.monotonic())
        self._failures.move_to_end(address)
        if len(self._failures) > ADDRESSES_MAX:
            self._failures.popitem(last=False)


def _same(shown: bytes, token: bytes) -> bool:
    return bool(token) and hmac.compare_digest(shown, token)
