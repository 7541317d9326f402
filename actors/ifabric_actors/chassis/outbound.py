"""What one request of a guest may be, and what of its response the guest may see. Pure.

**Nothing is repaired.** A path is allowed or refused as it was written, never cleaned first: whatever stands behind
the endpoint (a proxy, a framework, a file system) reads it once more in its own way, and two readings of one path are
how allow-lists are passed by. So a path has no dot segments, no empty ones, nothing encoded that would make either,
nothing that decodes twice, and no letter that Unicode folds into a slash or a dot.

**Headers** that frame the message, name the host, say who asks or ask for another method or path than the line above
them are not the guest's to set; `_` counts as `-`, since what comes after may take one for the other.

**Whose fault.** What is malformed is a `BadRequest` that the guest is told, and goes on. What reaches for more than it
was given is `EgressDenied`, and ends the run.

**The scrubber** knows the secret and the forms in which it is commonly repeated. It cannot know an endpoint that
turns what it was sent around, or sends one letter at a time: credentials belong to endpoints that do not echo.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlencode, urljoin, urlsplit

import msgspec

from ifabric.errors import BadRequest, EgressDenied, TooLarge, Unavailable
from ifabric.wire.envelope import decode
from ifabric_actors.chassis.routes import Route

#: of a request as the guest writes it, in bytes of JSON: room for the largest body, each letter escaped
ASK_MAX_BYTES = 8 << 20
TARGET_MAX = 8192
HEADERS_MAX = 64
HEADERS_MAX_BYTES = 16 * 1024
QUERY_MAX = 256
#: of what a guest wrote, in a sentence
QUOTED_MAX = 80
REDACTED = b"[redacted]"
#: times that the scrubber begins again, for what a replacement has put together
PASSES_MAX = 4

REDIRECTS = (301, 302, 303, 307, 308)
_BODILESS = ("GET", "HEAD")

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t -~]*")
#: pchar of RFC 3986 and the slash
_PATH = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
#: dots, and percent signs: what decodes twice
_ENCODED = re.compile(r"%(?:2e|25)", re.IGNORECASE)
#: what a URL may be written with (RFC 3986)
_URL = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")

_NOT_THE_GUESTS = frozenset(
    {
        # framing and the connection
        "connection", "content-length", "expect", "http2-settings", "keep-alive", "te", "trailer", "transfer-encoding",
        "upgrade",
        # who asks, for whom, and whom
        "authorization", "cookie", "cookie2", "forwarded", "host", "via", "x-client-ip", "x-cluster-client-ip",
        "x-host", "x-original-host", "x-real-ip",
        # another method or path than the one that was checked
        "x-http-method", "x-http-method-override", "x-method-override", "x-original-url", "x-rewrite-url",
    }
)  # fmt: skip
_NOT_THE_GUESTS_PREFIXES = ("proxy-", "x-forwarded-", "x-ifabric-", "sec-")
#: a part of an echo would carry a part of the secret past the scrubber
_NOT_WITH_A_SECRET = ("range", "if-range")
#: a guest may name these, and they are ours all the same
_OURS = ("accept-encoding", "user-agent")
#: of one connection (RFC 9110, 7.6.1), or a secret in itself
_NOT_FOR_GUESTS = frozenset(
    {
        "connection", "content-length", "keep-alive", "proxy-authenticate", "proxy-authentication-info",
        "proxy-connection", "set-cookie", "set-cookie2", "te", "trailer", "transfer-encoding", "upgrade",
    }
)  # fmt: skip


class Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a guest writes. At most one of `body` and `body_b64` is set."""

    endpoint: str
    method: str = "GET"
    path: str = "/"
    query: dict[str, str] = {}
    headers: dict[str, str] = {}
    body: str | None = None
    body_b64: str | None = None


_ASK = msgspec.json.Decoder(Ask)


@dataclass(frozen=True)
class Sending:
    """A request that was checked: the target with the endpoint's own path, and the guest's headers alone."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


class Head(NamedTuple):
    """The beginning of a response. Names in lower case."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]

    def all(self, name: bytes) -> list[bytes]:
        """The values of a header."""
        return [value for other, value in self.headers if other == name]


# -- the request --------------------------------------------------------------------------------------------------------


def parse(data: bytes) -> Ask:
    """The request in a guest's bytes. `BadRequest` with the place of the fault, `TooLarge`."""
    if len(data) > ASK_MAX_BYTES:
        raise TooLarge(f"the request has {len(data)} bytes of JSON; {ASK_MAX_BYTES} are allowed", allowed=ASK_MAX_BYTES)
    ask = decode(_ASK, data)
    if ask.body is not None and ask.body_b64 is not None:
        raise BadRequest("body and body_b64 are two ways to say the same; one of them may be there")
    return ask


def checked(ask: Ask, route: Route) -> Sending:
    """The request as the endpoint allows it. `EgressDenied`, `BadRequest`, `TooLarge`."""
    _refuse_method(ask.method, route)
    _refuse_path(ask.path, route)
    headers = _headers(ask.headers, route)
    body = _body(ask, route)
    if len(ask.query) > QUERY_MAX:
        raise BadRequest(f"the query has {len(ask.query)} names; {QUERY_MAX} are allowed", allowed=QUERY_MAX)
    target = route.base + ask.path
    if ask.query:
        target += "?" + urlencode(ask.query, quote_via=quote, safe="")
    if len(target) > TARGET_MAX:
        raise BadRequest(f"path and query have {len(target)} letters; {TARGET_MAX} are allowed", allowed=TARGET_MAX)
    return Sending(ask.method, target, headers, body)


def denied(route: Route, why: str) -> EgressDenied:
    """The end of a run, for this reason."""
    return EgressDenied(
        f"not allowed at the endpoint {route.name}: {why}; the run was ended",
        host=route.host,
        why=why,
        endpoint=route.name,
    )


def path_fault(path: str) -> str | None:
    """Why a path could be read in more than one way; None: it cannot."""
    if not path.startswith("/"):
        return "does not begin with a slash"
    if not _PATH.fullmatch(path):
        return "has letters that a path is not written with; they have to be percent-encoded"
    if _ENCODED.search(path):
        return "has an encoded dot or percent sign"
    try:
        read = unicodedata.normalize("NFKC", unquote_to_bytes(path).decode())
    except UnicodeDecodeError:
        return "does not decode to UTF-8"
    if read.count("/") != path.count("/") or "\\" in read or not read.isprintable():
        return "decodes to a slash, or to what cannot be printed"
    *segments, last = read.split("/")[1:]
    # ";": what comes after it is a parameter for some, and taken away. Dots and spaces at an end: the same
    if not all(segment.partition(";")[0].strip(". ") for segment in (*segments, *([last] if last else []))):
        return "has a segment that is empty or of dots"
    return None


def _refuse_method(method: str, route: Route) -> None:
    if method not in route.methods:
        raise denied(route, f"method {_quoted(method)}; allowed is {', '.join(sorted(route.methods))}")


def _refuse_path(path: str, route: Route) -> None:
    fault = path_fault(path)
    if fault is not None:
        raise denied(route, f"path {_quoted(path)}, which {fault}")
    if not any(path == allowed or (allowed.endswith("/") and path.startswith(allowed)) for allowed in route.paths):
        raise denied(route, f"path {_quoted(path)}; allowed is {', '.join(route.paths)}")


def _headers(headers: Mapping[str, str], route: Route) -> tuple[tuple[str, str], ...]:
    size = sum(len(name) + len(value) for name, value in headers.items())
    if len(headers) > HEADERS_MAX or size > HEADERS_MAX_BYTES:
        raise BadRequest(
            f"{len(headers)} headers of {size} bytes are too many; {HEADERS_MAX} of {HEADERS_MAX_BYTES} are allowed"
        )
    kept: dict[str, tuple[str, str]] = {}
    for name, value in headers.items():
        folded = name.lower().replace("_", "-")
        if not _TOKEN.fullmatch(name):
            raise denied(route, f"header {_quoted(name)}, which is no name")
        if any(letter in value for letter in "\r\n\0"):
            raise denied(route, f"header {name} with a line break or a NUL in it")
        if not _VALUE.fullmatch(value):
            raise BadRequest(f"the header {name} has letters that are not printable ASCII")
        mine = folded in _NOT_THE_GUESTS or folded.startswith(_NOT_THE_GUESTS_PREFIXES)
        secret = route.secret_header is not None and folded in (route.secret_header, *_NOT_WITH_A_SECRET)
        if mine or secret:
            raise denied(route, f"header {name}, which is not for a guest to set")
        if folded in kept:
            raise BadRequest(f"the header {name} is there twice")
        kept[folded] = (name, value.strip(" \t"))
    return tuple(pair for folded, pair in kept.items() if folded not in _OURS)


def _body(ask: Ask, route: Route) -> bytes:
    try:
        body = base64.b64decode(ask.body_b64, validate=True) if ask.body_b64 is not None else (ask.body or "").encode()
    except (binascii.Error, ValueError) as error:
        raise BadRequest(f"body_b64 is not base64: {error}") from None
    if body and ask.method in _BODILESS:
        raise BadRequest(f"a {ask.method} has no body")
    if len(body) > route.request_max_bytes:
        raise TooLarge(
            f"the body has {len(body)} bytes; the endpoint {route.name} allows {route.request_max_bytes}",
            allowed=route.request_max_bytes,
        )
    return body


def _quoted(text: str) -> str:
    return ascii(text if len(text) <= QUOTED_MAX else text[:QUOTED_MAX] + "...")


def stamped(
    sending: Sending, route: Route, *, run: str, task: str | None, fence: int | None
) -> list[tuple[bytes, bytes]]:
    """All headers of a request but the credential: the guest's and ours."""
    headers = [("Host", route.authority), *sending.headers]
    # a compressed echo of the secret would go past the scrubber
    headers += [("Accept-Encoding", "identity"), ("User-Agent", "ifabric"), ("X-Ifabric-Run", run)]
    if task is not None:
        headers.append(("X-Ifabric-Task", quote(task, safe="")))
    if fence is not None:
        headers.append(("X-Ifabric-Fence", str(fence)))
    if sending.body or sending.method not in _BODILESS:
        headers.append(("Content-Length", str(len(sending.body))))
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in headers]


def size(sending: Sending, headers: list[tuple[bytes, bytes]]) -> int:
    """Bytes of a request as it is written, near enough: target, headers, body."""
    return len(sending.target) + sum(len(name) + len(value) for name, value in headers) + len(sending.body)


def is_value(text: str) -> bool:
    """Whether a header can carry this."""
    return bool(text) and _VALUE.fullmatch(text) is not None and text == text.strip()


# -- redirects ----------------------------------------------------------------------------------------------------------


def redirected(sending: Sending, route: Route, head: Head) -> Sending | None:
    """The request that a response asks to make instead; None: it asks for none. `EgressDenied` when it leads away."""
    locations = head.all(b"location")
    if head.status not in REDIRECTS or not locations:
        return None
    location = locations[0].decode("latin-1")
    if len(locations) > 1 or not _URL.fullmatch(location):
        raise denied(route, "redirect to what is not one URL")
    try:
        parts = urlsplit(urljoin(route.origin + sending.target, location))
        where = (parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme))
    except ValueError:
        raise denied(route, "redirect to what is not a URL") from None
    if where != (route.scheme, route.host, route.port) or "@" in parts.netloc:
        raise denied(route, f"redirect to {_quoted(f'{parts.scheme}://{parts.netloc}')}, away from {route.origin}")
    if route.base and not parts.path.startswith(route.base + "/"):
        raise denied(route, f"redirect out of {route.base}")
    path = parts.path[len(route.base) :] or "/"
    try:
        _refuse_path(path, route)
        method, sending = _next(sending, head.status)
        _refuse_method(method, route)
    except EgressDenied as fault:
        raise denied(route, f"redirect: {fault.facts['why']}") from None
    target = route.base + path + (f"?{parts.query}" if parts.query else "")
    if len(target) > TARGET_MAX:
        raise denied(route, f"redirect to a URL of {len(target)} letters")
    return Sending(method, target, sending.headers, sending.body)


def _next(sending: Sending, status: int) -> tuple[str, Sending]:
    """The method that follows, as browsers have it (the Fetch standard, 4.4), and what goes with it."""
    method = sending.method
    to_get = (status in (301, 302) and method == "POST") or (status == 303 and method not in _BODILESS)
    if not to_get:
        return method, sending
    headers = tuple(pair for pair in sending.headers if not pair[0].lower().startswith("content-"))
    return "GET", Sending("GET", sending.target, headers)


# -- the response -------------------------------------------------------------------------------------------------------


def scrub(data: bytes, forms: Iterable[bytes]) -> bytes:
    """The same without any of the forms. They come with the longest first."""
    forms = tuple(forms)
    for _ in range(PASSES_MAX):
        found = [form for form in forms if form and form in data]
        if not found:
            return data
        for form in found:
            data = data.replace(form, REDACTED)
    return REDACTED  # a secret that is in "[redacted]" itself, or that each replacement makes again


def scrubbed(value: Any, forms: tuple[bytes, ...]) -> Any:
    """The same for what an error says: texts, and what they are in."""
    if isinstance(value, str):
        return scrub(value.encode(errors="replace"), forms).decode(errors="replace")
    if isinstance(value, Mapping):
        return {scrubbed(key, forms): scrubbed(inner, forms) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrubbed(inner, forms) for inner in value]
    return value


def length(head: Head) -> int:
    """What a response says of its length; 0: nothing."""
    said = head.all(b"content-length")
    return int(said[0]) if said and head.status not in (204, 304) else 0


def too_long(route: Route) -> TooLarge:
    """What a guest is told instead of a response that is over the limit."""
    return TooLarge(
        f"the response is longer than {route.response_max_bytes} bytes, which is what the endpoint {route.name} allows",
        allowed=route.response_max_bytes,
    )


def refuse_encoded(head: Head, route: Route) -> None:
    """`Unavailable` for a response that the scrubber could not look into."""
    codings = [word.strip().lower() for value in head.all(b"content-encoding") for word in value.split(b",")]
    if any(word not in (b"", b"identity") for word in codings):
        raise Unavailable(
            f"the endpoint {route.name} sent a compressed response, which it was told not to do",
            what="endpoint",
            why="content-encoding",
            status=head.status,
        )


def answer(head: Head, body: bytes, forms: tuple[bytes, ...]) -> bytes:
    """The response as the guest gets it, in JSON."""
    dropped = {word.strip().lower() for value in head.all(b"connection") for word in value.decode("latin-1").split(",")}
    headers: dict[str, str] = {}
    for raw, value in head.headers:
        name, text = (scrub(part, forms).decode("latin-1") for part in (raw, value))
        if name not in _NOT_FOR_GUESTS and name not in dropped:
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
    told: dict[str, Any] = {"status": head.status, "headers": headers}
    clean = scrub(body, forms)
    try:
        told["body"] = clean.decode()
    except UnicodeDecodeError:
        told["body_b64"] = base64.b64encode(clean).decode()
    return msgspec.json.encode(told)
