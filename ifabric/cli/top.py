"""`ifabric top`: the daemon at a glance, second by second."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric import endpoints
from ifabric.cli.daemon import HttpTls
from ifabric.cli.glance import NARROW, Picture, draw
from ifabric.cli.options import Json
from ifabric.cli.output import out, print_json
from ifabric.clock import monotonic
from ifabric.errors import ConfigError, FabricError, Unreachable

if TYPE_CHECKING:
    from rich.live import Live

#: how often the keyboard and the size are looked at, and how long after a loss it is tried again
LOOK_S, AGAIN_S = 0.2, 1.0
#: with --once: how long after the first state the latest refusals are waited for
MORE_S = 1.5
#: columns off a terminal
WIDE = 200
QUIT = ("q", "Q", "\x03", "\x04")


def top(
    *,
    http: Annotated[str | None, Parameter(help="URL of a daemon's HTTP port. Default: this machine's daemon.")] = None,
    token_file: Annotated[
        Path | None,
        Parameter(env_var="IFABRIC_VIEWER_TOKEN_FILE", help="Its first line is the token of page.viewer_token_file."),
    ] = None,
    once: Annotated[bool, Parameter(help="One picture, and no more; so it is also off a terminal.")] = False,
    state_dir: Annotated[Path | None, Parameter(help="State directory of the daemon.")] = None,
    timeout: Annotated[
        float, Parameter(help="Seconds without a sign of life until it is called lost.", validator=Number(gt=0, lte=60))
    ] = 5.0,
    tls: HttpTls | None = None,
    json: Json = False,
) -> int:
    """Show a daemon at a glance, second by second: how it is and why, claims and their
    latency, the board, money, breakers, sandboxes, actors, the latest refusals and
    events. `q` or Ctrl-C ends it.

    It reads what the live page reads. When the connection is lost it says so and goes
    on trying. Exit 3 when there is nobody from the start.

    For example:

        ifabric top
        ifabric top --http https://fabric-2:8080 --http-ca ca.crt --token-file viewer.token
        ifabric top --once
        ifabric top --json | jq .counts
    """
    found = _place(http, state_dir, tls)
    reading = _Reading(found, timeout, tls, _token(token_file))
    try:
        reading.begin(timeout)
        if json:
            print_json(reading.picture.now)
        elif once or not sys.stdout.isatty():
            reading.wait_for("refusals", MORE_S)
            wide = out.width if sys.stdout.isatty() else WIDE
            # off a terminal one section is below the other: for `grep` and for mail
            drawn = draw(reading.picture, out.width if sys.stdout.isatty() else NARROW - 1, 0, monotonic())
            out.print(drawn, width=wide, soft_wrap=False)
        else:
            with contextlib.suppress(KeyboardInterrupt):
                _show(reading)
    finally:
        reading.end()
    return 0


def _place(http: str | None, state_dir: Path | None, tls: HttpTls | None) -> endpoints.Endpoints:
    folder = state_dir or endpoints.default_state_dir()
    here = endpoints.read(folder)
    if http is None:
        if here is None:
            raise Unreachable(
                f"no daemon runs here (none in {folder}); start one with `ifabric run`, or give --state-dir or --http"
            )
        return here
    url = http.rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--http {http[:80]!r}: write http://HOST:PORT or https://HOST:PORT")
    if here is not None and url == here.http:
        return here
    if url.startswith("https://") and (tls is None or tls.http_ca is None):
        raise ConfigError("--http with https needs --http-ca: the authority that the daemon is known by")
    return endpoints.Endpoints(nats="", etcd=(), http=url, pid=os.getpid(), version="")


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {file}: {error}") from None
    token = lines[0].strip() if lines else ""
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"--token-file {file}: its first line is no token")
    return token


class _Reading:
    """Reads the stream in a thread of its own, and again when it was lost."""

    def __init__(self, found: endpoints.Endpoints, timeout_s: float, tls: HttpTls | None, token: str | None) -> None:
        self._where = (found, timeout_s, tls, token)
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._failed: FabricError | None = None
        self._socket: socket.socket | None = None
        self.picture = Picture()
        #: grows with each change
        self.version = 0
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)

    def begin(self, timeout_s: float) -> None:
        """Returns when the daemon has said how it is. Raises what keeps it from that."""
        self._thread.start()
        self.wait_for("now", timeout_s + AGAIN_S)
        if "now" not in self.picture.seen:
            raise self._failed or Unreachable(f"{self._where[0].http} does not say how it is")

    def wait_for(self, event: str, within_s: float) -> None:
        """Returns when an event of that name has come, when it failed, or when the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: event in self.picture.seen or self._failed is not None, within_s)

    def wait(self, version: int, within_s: float) -> None:
        """Returns when there is something newer than that, or when the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != version, within_s)

    @contextlib.contextmanager
    def held(self) -> Iterator[Picture]:
        """The picture, while nothing changes it."""
        with self._changed:
            yield self.picture

    def end(self) -> None:
        """Ends the stream and the thread; one that is just connecting ends with the process."""
        self._over.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has ended already
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(AGAIN_S)

    def _opened(self, connection: socket.socket) -> None:
        self._socket = connection

    def _run(self) -> None:
        from ifabric.cli.streaming import stream

        while not self._over.is_set():
            try:
                for event, data in stream(*self._where, self._opened):
                    if self._over.is_set():
                        return
                    self._take(event, data)
            except FabricError as error:
                lasting = not isinstance(error, Unreachable)
                with self._changed:
                    self.picture.trouble = error.message
                    self._failed = error if lasting or "now" not in self.picture.seen else None
                    self.version += 1
                    self._changed.notify_all()
                if lasting and "now" not in self.picture.seen:
                    return
            self._over.wait(AGAIN_S)

    def _take(self, event: str, data: Any) -> None:
        with self._changed:
            self.picture.take(event, data, monotonic())
            self._failed = None
            self.version += 1
            self._changed.notify_all()


def _show(reading: _Reading) -> None:
    """Until somebody has seen enough."""
    from rich.live import Live

    with _keys() as pressed, Live(console=out, screen=True, auto_refresh=False) as live:
        drawn: tuple[int, int, int, int] | None = None
        while not pressed():
            size = out.size
            state = (reading.version, size.width, size.height, int(monotonic()))
            if state != drawn:
                _draw(live, reading, size.width, size.height)
                drawn = state
            reading.wait(reading.version, LOOK_S)


def _draw(live: Live, reading: _Reading, width: int, height: int) -> None:
    with reading.held() as picture:
        live.update(draw(picture, width, height, monotonic()), refresh=True)


@contextlib.contextmanager
def _keys() -> Iterator[Any]:
    """A function that says whether one of `QUIT` was pressed. Where stdin is no terminal, nothing ever is."""
    if not sys.stdin.isatty():
        yield lambda: False
        return
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def pressed() -> bool:
        if not select.select([terminal], [], [], 0)[0]:
            return False
        typed = os.read(terminal, 64).decode(errors="replace")
        return not typed or any(key in QUIT for key in typed)

    try:
        tty.setcbreak(terminal)
        yield pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
