"""Vault over hvac, which blocks: in threads of its own, and never for longer than its caller waits.

**What can get stuck.** A request in its thread has the timeouts of `requests`, which bound each step and not their sum:
a server that sends a byte now and then is within them for ever. So the caller's wait has an end of its own, and at that
end the connection is shut from outside: the thread wakes up and is free. Only a resolver that hangs cannot be shut. Its
thread is counted as stuck until it comes back, and when all are, callers are told at once: they pay for one frozen
Vault once, and the loop and its other work for none.

**What is trusted.** The system's certificates or `ca_cert`, and nothing of the environment: no proxy (it would see the
token), no `.netrc`, no `VAULT_TOKEN`, no client certificate. No redirect is followed: it would carry the token along.

**What is said.** The errors of hvac and requests carry URLs, bodies and, for a token that is no header, the token. They
end here: a failure is a value, `Failed`, with a sentence of ours. What Vault answers is `Hidden`, in every variable of
every frame, because a log may show those.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import ssl
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

import hvac  # type: ignore[import-untyped]
import requests
import urllib3
from requests.adapters import HTTPAdapter

if TYPE_CHECKING:
    from ifabric.metrics import Metrics

T = TypeVar("T")
#: threads, and so requests at a time
WORKERS = 4
#: an answer is some hundred bytes: more than this comes from something that is not Vault
ANSWER_MAX_BYTES = 1 << 20
FILE_MAX_BYTES = 64 * 1024

#: what a request is made of: it gets a client that has its token
Call = Callable[[Any], Any]


class Guarded:
    """What is shown of it is what `__repr__` says, wherever it turns up; it cannot be copied, pickled or encoded."""

    __slots__ = ()

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, _: str) -> str:
        return repr(self)

    def __getstate__(self) -> NoReturn:
        """What `copy` and `pickle` would take along."""
        raise TypeError(f"{type(self).__name__} stays in its process")


class Hidden(Guarded, Generic[T]):
    """Something that no log, repr or traceback shows."""

    __slots__ = ("_held",)

    def __init__(self, held: T) -> None:
        self._held = held

    def __repr__(self) -> str:
        return "<hidden>"

    def open(self) -> T:
        """What it is."""
        return self._held


class Failed(NamedTuple):
    """Vault did not do it."""

    #: a sentence for the caller
    why: str
    #: of HTTP; 0: there was no answer
    status: int = 0

    @property
    def is_down(self) -> bool:
        """Whether it may do it later, unchanged."""
        return self.status in (0, 412, 429) or self.status >= 500


Answer = Hidden[dict[str, Any]]

_BY_STATUS = {
    400: "takes the request for malformed",
    401: "does not know who asks",
    403: "refuses the token",
    429: "is asked too often",
    472: "is a standby of another site",
    473: "is a standby",
    501: "was never initialised",
    503: "is sealed, or down for maintenance",
}
#: the first that fits counts
_BY_KIND: tuple[tuple[type[Exception], str], ...] = (
    (requests.exceptions.SSLError, "shows a certificate that is not trusted, or does not speak TLS"),
    (requests.exceptions.Timeout, "does not answer in time"),
    (urllib3.exceptions.TimeoutError, "does not answer in time"),
    (requests.exceptions.ConnectionError, "cannot be reached, or hung up"),
    (urllib3.exceptions.ProtocolError, "hung up in the middle of its answer"),
)


class _TooMuch(Exception):
    """The answer is over its limit."""


class _Adapter(HTTPAdapter):
    """Trusts one context, reads no more than the limit, and knows its socket."""

    def __init__(self, tls: ssl.SSLContext | None) -> None:
        self._tls = tls
        self._socket: socket.socket | None = None
        self._hung_up = False
        self.status = 0
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        host, _ = super().build_connection_pool_key_attributes(request, verify, cert)
        return host, {} if self._tls is None else {"ssl_context": self._tls}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Nothing: `requests` would trust the certificates it brings along, and hvac show one of the environment."""

    def get_connection_with_tls_context(self, request: Any, verify: Any, proxies: Any = None, cert: Any = None) -> Any:
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies, cert)
        kind = type(pool).ConnectionCls

        def watched(*args: Any, **options: Any) -> Any:
            connection = kind(*args, **options)
            connect = connection.connect

            def connected() -> None:
                connect()
                self._socket = connection.sock
                if self._hung_up:
                    self.hang_up()

            connection.connect = connected
            return connection

        pool.ConnectionCls = watched
        return pool

    def send(self, request: Any, *args: Any, **options: Any) -> Any:
        response = super().send(request, *args, **options)
        body = response.raw.read(ANSWER_MAX_BYTES + 1, decode_content=True)
        if len(body) > ANSWER_MAX_BYTES:
            response.raw.close()
            raise _TooMuch
        response.raw = io.BytesIO(body)
        self.status = response.status_code
        return response

    def hang_up(self) -> None:
        """Whoever waits for the server wakes up with an error. For any thread."""
        self._hung_up = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed
                # past `SSLSocket.shutdown`, which takes TLS away first: a thread that is about to send would send
                # its token in the clear
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Line:
    """One hvac client with one connection: of one thread at a time, but `hang_up` is for any."""

    def __init__(self, config: Any) -> None:
        secure = config.vault_addr.startswith("https:")
        self._adapter = _Adapter(ssl.create_default_context(cafile=config.ca_cert) if secure else None)
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.mount("http://", self._adapter)
        self._session.mount("https://", self._adapter)
        self._client = hvac.Client(
            url=config.vault_addr,
            token="",  # with None, hvac would look for one in the environment
            verify=True,
            timeout=config.timeout_seconds,
            allow_redirects=False,
            session=self._session,
            namespace=config.vault_namespace,
        )
        self.broken = False

    def ask(self, call: Call, token: Hidden[str] | None) -> Any:
        """What hvac makes of it. Raises whatever it raises."""
        self._client.token = token.open() if token is not None else ""
        try:
            return call(self._client)
        except hvac.exceptions.VaultError:
            raise
        except BaseException:
            self.broken = True
            raise
        finally:
            self._client.token = ""

    @property
    def status(self) -> int:
        """Of the last answer."""
        return self._adapter.status

    def hang_up(self) -> None:
        self.broken = True
        self._adapter.hang_up()

    def close(self) -> None:
        self._session.close()


class _Job:
    """One request on its way through a thread."""

    def __init__(self) -> None:
        self._line: _Line | None = None
        self._given_up = False
        self._lock = threading.Lock()

    def has(self, line: _Line | None) -> None:
        """The line that it is on. None: none any more."""
        with self._lock:
            self._line = line
            if line is not None and self._given_up:
                line.hang_up()

    def give_up(self) -> None:
        """Hangs up; a line that is somebody else's by now is left alone."""
        with self._lock:
            self._given_up = True
            if self._line is not None:
                self._line.hang_up()


class Lines:
    """Requests to Vault: at most `WORKERS` at a time, each with an end."""

    def __init__(self, config: Any, metrics: Metrics) -> None:
        self._config = config
        #: for sentences: without the user and password that a URL may hold
        self.where = "Vault at " + urlsplit(config.vault_addr or "").netloc.rpartition("@")[2]
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="vault")
        self._idle: list[_Line] = []
        self._jobs: dict[Future[Answer | Failed], _Job] = {}
        #: requests that were given up and whose thread has not come back
        self._stuck: set[Future[Answer | Failed]] = set()
        self._closed = False
        self._done = metrics.counter("if_chassis_vault_requests_total", outcome="done")
        self._failed = metrics.counter("if_chassis_vault_requests_total", outcome="failed")

    async def ask(self, call: Call, token: Hidden[str] | None, until: float) -> Answer | Failed:
        """What Vault answers, or `Failed`. `until` is on the loop's clock."""
        if self._closed:
            return Failed("The daemon is stopping: Vault is not asked any more.")
        self._stuck = {future for future in self._stuck if not future.done()}
        if len(self._stuck) >= WORKERS:
            return Failed(f"All {WORKERS} requests to {self.where} hang: it is not asked until one of them ends.")
        answer = await self._sent(call, token, until)
        (self._failed if isinstance(answer, Failed) else self._done).inc()
        return answer

    async def _sent(self, call: Call, token: Hidden[str] | None, until: float) -> Answer | Failed:
        job = _Job()
        future = self._threads.submit(self._carry_out, job, call, token)
        self._jobs[future] = job
        try:
            await asyncio.wait(
                {asyncio.wrap_future(future)}, timeout=max(0.0, until - asyncio.get_running_loop().time())
            )
            if future.done():
                return future.result()
            return Failed(f"{self.where} does not answer in time.")
        finally:
            del self._jobs[future]
            if not future.done() and not future.cancel():
                self._stuck.add(future)
                job.give_up()

    def close(self) -> None:
        """Ends all requests. Twice is harmless."""
        self._closed = True
        for job in self._jobs.values():
            job.give_up()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._close_idle()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    # -- in a thread ----------------------------------------------------------------------------------------------------

    def _carry_out(self, job: _Job, call: Call, token: Hidden[str] | None) -> Answer | Failed:
        try:
            line = self._idle.pop()
        except IndexError:
            try:
                line = _Line(self._config)
            except OSError as error:
                return Failed(f"ca_cert, {self._config.ca_cert}, cannot be used: {error.strerror or 'not PEM'}.")
        job.has(line)
        try:
            return self._judged(line, call, token)
        finally:
            job.has(None)
            if line.broken:
                line.close()
            else:
                self._idle.append(line)
            if self._closed:
                self._close_idle()

    def _judged(self, line: _Line, call: Call, token: Hidden[str] | None) -> Answer | Failed:
        try:
            answer = Hidden(line.ask(call, token))
        except hvac.exceptions.VaultError:
            status = line.status
            return Failed(f"{self.where} {_BY_STATUS.get(status, 'answers with an error of its own')}.", status)
        except _TooMuch:
            return Failed(f"{self.where} answers with more than {ANSWER_MAX_BYTES} bytes: it is not Vault.")
        except Exception as error:  # of any kind: what it says may hold the token
            what = next((words for kind, words in _BY_KIND if isinstance(error, kind)), None)
            return Failed(f"{self.where} {what or f'could not be asked ({type(error).__name__})'}.")
        if isinstance(answer.open(), dict):
            return answer
        if line.status == 204:
            return Hidden({})
        return Failed(f"{self.where} answers with HTTP {line.status} and not with what was asked for.", line.status)


def read_file(path: str, what: str) -> Hidden[str] | Failed:
    """One line of visible ASCII from a small file. It is opened anew each time: whoever keeps it fresh may write it in
    place or put another in its place, and neither shows for certain in what `stat` says.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would keep us waiting
        with os.fdopen(opened, "rb") as file:
            held = Hidden(file.read(FILE_MAX_BYTES) or b"")
    except OSError as error:
        return Failed(f"The file with {what}, {path}, cannot be read: {error.strerror}.")
    text = Hidden(held.open().strip().decode("ascii", "replace"))
    if not text.open():
        return Failed(f"The file with {what}, {path}, is empty.")
    if not all("!" <= letter <= "~" for letter in text.open()):
        return Failed(f"The file with {what}, {path}, holds something else: one line without spaces is expected.")
    return text
