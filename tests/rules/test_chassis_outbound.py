"""What one request of a guest may be, and what of its response the guest may see."""

from __future__ import annotations

import base64
import html
import json
import posixpath
from typing import Any
from urllib.parse import quote, quote_plus, unquote

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from ifabric.config_chassis import Endpoint
from ifabric.errors import BadRequest, ConfigError, EgressDenied, FabricError, TooLarge, Unavailable
from ifabric_actors.chassis import breaking, outbound, routes
from ifabric_actors.chassis.outbound import Ask, Head, Sending, path_fault
from ifabric_actors.chassis.routes import Bucket, Route
from ifabric_actors.chassis.scrub import forms_of

SECRET = {"vault_path": "secret/data/x", "header": "X-Api-Key"}


def route(url: str = "https://api.example.com/v1", **endpoint: Any) -> Route:
    return routes.route("api", msgspec.convert({"url": url, **endpoint}, Endpoint))


ROUTE = route(methods=("GET", "POST", "HEAD"), paths=("/chat", "/files/"), request_max_bytes=100)


def sent(where: Route = ROUTE, **ask: Any) -> Sending:
    return outbound.checked(Ask(**{"endpoint": "api", "path": "/chat", **ask}), where)


def refusal(where: Route = ROUTE, **ask: Any) -> FabricError:
    with pytest.raises(FabricError) as caught:
        sent(where, **ask)
    return caught.value


# -- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "endpoint"),
        (b"[]", "object"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"endpoint": 1}', r"\$\.endpoint"),
        (b'{"endpoint": "x", "headers": {"a": 1}}', r"\$\.headers"),
        (b'{"endpoint": "x", "url": "http://y"}', "url"),
        (b'{"endpoint": "x", "path": "\\ud800"}', "not JSON"),
        (b'{"endpoint": "x", "body": "a", "body_b64": "YQ=="}', "two ways"),
        (b'{"endpoint": ' + b"[" * 100_000, "expected|Expected|nested"),
    ],
)
def test_what_is_malformed_is_a_bad_request_that_names_the_place(data: bytes, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        outbound.parse(data)


def test_a_request_as_json_has_a_limit() -> None:
    with pytest.raises(TooLarge):
        outbound.parse(b'{"endpoint": "' + b"x" * outbound.ASK_MAX_BYTES + b'"}')


# -- method and path ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["DELETE", "get", "", "CONNECT", "GET ", "GET\r\nX: y", "OPTIONS", "TRACE"])
def test_a_method_that_is_not_allowed_ends_the_run(method: str) -> None:
    error = refusal(method=method)
    assert isinstance(error, EgressDenied)
    assert error.facts["host"] == "api.example.com"
    assert error.facts["why"].startswith("method ")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "chat",
        "files/a",
        "/",
        "/chat/",
        "/chat/more",
        "/chatter",
        "/files",
        "/other",
        "/Files/a",
        "/%66iles/a",
        "//evil.example.com/files/",
        "/files//a",
        "/files/../chat",
        "/files/..",
        "/files/.",
        "/files/./a",
        "/files/../../etc/passwd",
        "/files/.../a",
        "/files/%2e%2e/a",
        "/files/%2E%2e/a",
        "/files/.%2e/a",
        "/files/a%2e",
        "/files/a%2Eb",
        "/files/%252e%252e/a",
        "/files/%2fa",
        "/files/%2Fa",
        "/files/..%2fa",
        "/files/%5c..%5ca",
        "/files/%5Ca",
        "/files/..\\a",
        "/files/a\\b",
        "\\files\\a",
        "/files/..;/a",
        "/files/;x/a",
        "/files/..;x=1/a",
        "/files/%20/a",
        "/files/..%20/a",
        "/files/%00a",
        "/files/a%00",
        "/files/%0d%0aX:y",
        "/files/%7f",
        "/files/a b",
        "/files/a\r\nX: y",
        "/files/a\tb",
        "/files/a\0",
        "/files/é",
        "/files/%",
        "/files/%4",
        "/files/%zz",
        "/files/%u002e",
        "/files/%c0%ae%c0%ae/a",  # two bytes for a dot, as some decode it
        "/files/%ff",
        "/files/%ef%bc%8e%ef%bc%8e/a",  # full-width dots
        "/files/%e2%80%a5/a",  # a two dot leader
        "/files/a%ef%bc%8fb",  # a full-width slash
        "/files/a%ef%bc%bcb",  # a full-width backslash
        "/files/%e2%80%ae",  # from right to left
        "/files/?x=1",
        "/files/a#b",
        "/chat?x",
        "http://evil.example.com/chat",
        "https://api.example.com/v1/chat",
        "@evil.example.com/chat",
        ".evil.example.com/chat",
        ":8080/chat",
    ],
)
def test_a_path_that_is_not_allowed_or_reads_in_two_ways_ends_the_run(path: str) -> None:
    error = refusal(path=path)
    assert isinstance(error, EgressDenied)
    assert error.facts["why"].startswith("path ")
    assert error.facts["why"].isprintable() and error.message.isascii()


@pytest.mark.parametrize(
    "path",
    [
        "/chat",
        "/files/",
        "/files/a",
        "/files/a/",
        "/files/a.txt",
        "/files/.well-known/x",
        "/files/..a/b..",
        "/files/a:b@c!$&'()*+,;=~_-",
        "/files/a%20b",
        "/files/%C3%A9",
        "/files/%e6%97%a5",
        "/files/a;v=1/b",
    ],
)
def test_a_path_that_is_allowed_goes_as_it_was_written(path: str) -> None:
    assert sent(path=path).target == f"/v1{path}"


def test_a_slash_allows_everything_below_the_url_and_nothing_else() -> None:
    everything = route(url="https://api.example.com")
    assert sent(everything, path="/any/thing").target == "/any/thing"
    assert "away" in refused_redirect(everything, "https://api.example.org/").facts["why"]


SEGMENT = st.text(st.sampled_from("./\\%;?#@:aé .25ef20cAE-\u2025\uff0e\uff0f"), max_size=30)


@given(SEGMENT.map("/files/{}".format) | st.text(max_size=30).map("/files/{}".format) | SEGMENT)
@example("/files/..%2f..%2fetc")
@example("/files/%252e%252e/x")
def test_no_path_that_is_allowed_leads_out_of_what_is_allowed(path: str) -> None:
    try:
        sent(path=path)
    except EgressDenied:
        return
    assert path == "/chat" or path.startswith("/files/")
    read = path
    for _ in range(3):
        for seen in (read, read.replace("\\", "/"), "/".join(part.partition(";")[0] for part in read.split("/"))):
            normal = posixpath.normpath(seen)
            assert normal == "/chat" or f"{normal}/".startswith("/files/")
        read = unquote(read)


def test_a_query_cannot_say_more_than_its_values() -> None:
    target = sent(query={"a b": "c&d=e", "x": "1\r\nHost: y", "é": "#?/../"}).target
    assert target == "/v1/chat?a%20b=c%26d%3De&x=1%0D%0AHost%3A%20y&%C3%A9=%23%3F%2F..%2F"


@pytest.mark.parametrize(
    "ask",
    [
        {"query": {str(number): "" for number in range(outbound.QUERY_MAX + 1)}},
        {"query": {"a": "x" * outbound.TARGET_MAX}},
        {"headers": {f"a{number}": "" for number in range(outbound.HEADERS_MAX + 1)}},
        {"headers": {"a": "x" * outbound.HEADERS_MAX_BYTES}},
        {"headers": {"a": "é"}},
        {"headers": {"a": "\x01"}},
        {"headers": {"Accept": "a", "accept": "b"}},
        {"headers": {"x-a": "a", "x_a": "b"}},
        {"method": "GET", "body": "x"},
        {"method": "HEAD", "body_b64": "eA=="},
        {"method": "POST", "body_b64": "x"},
        {"method": "POST", "body_b64": "é"},
        {"method": "POST", "body_b64": "eA==\n"},
    ],
)
def test_what_is_malformed_does_not_end_the_run(ask: dict[str, Any]) -> None:
    assert isinstance(refusal(**ask), BadRequest)


def test_a_body_has_the_endpoints_limit() -> None:
    assert sent(method="POST", body="x" * 100).body == b"x" * 100
    assert refusal(method="POST", body="x" * 101).facts == {"allowed": 100}
    assert isinstance(refusal(method="POST", body="é" * 51), TooLarge)
    assert isinstance(refusal(method="POST", body_b64=base64.b64encode(bytes(101)).decode()), TooLarge)


# -- headers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Host", "host", "Authorization", "AUTHORIZATION", "Cookie", "Cookie2", "Proxy-Authorization", "Proxy-Connection",
        "Content-Length", "content_length", "Transfer-Encoding", "Transfer_Encoding", "Connection", "Keep-Alive", "TE",
        "Trailer", "Upgrade", "HTTP2-Settings", "Expect", "Forwarded", "X-Forwarded-For", "X_Forwarded_For", "Via",
        "X-Forwarded-Host", "X-Real-IP", "X-Ifabric-Run", "X-Ifabric-Fence", "x_ifabric_task", "X-HTTP-Method-Override",
        "X-HTTP-Method", "X-Method-Override", "X-Original-URL", "X-Rewrite-URL", "X-Host", "Sec-WebSocket-Key",
        "X-Original-Host", "X-Client-IP", "X-Cluster-Client-IP",
        "", " ", "a b", "a:", ":authority", "a\r\nHost", "a\n", "é", "a\0", "(a)", '"a"', "a,b", "Host ", " Host",
        "Transfer-Encoding\t",
    ],
)  # fmt: skip
def test_a_header_that_is_not_the_guests_to_set_ends_the_run(name: str) -> None:
    error = refusal(headers={name: "x"})
    assert isinstance(error, EgressDenied)
    assert error.facts["why"].startswith("header ") and error.facts["why"].isprintable()


@pytest.mark.parametrize("value", ["a\r\nHost: b", "a\rb", "a\nb", "\n", "a\0b", "a\r\n b"])
def test_a_line_break_in_a_header_ends_the_run(value: str) -> None:
    assert "line break" in refusal(headers={"X-A": value}).facts["why"]


@pytest.mark.parametrize("name", ["X-Api-Key", "x-api-key", "X_API_KEY", "Range", "If-Range"])
def test_where_there_is_a_credential_the_guest_sets_neither_it_nor_a_part_of_an_echo(name: str) -> None:
    assert isinstance(refusal(route(credential=SECRET, paths=("/chat",)), headers={name: "x"}), EgressDenied)
    assert sent(route(paths=("/chat",)), headers={name: "x"}).headers == ((name, "x"),)


def test_other_headers_go_as_they_are_and_those_of_ours_are_ours() -> None:
    sending = sent(
        headers={"Content-Type": " text/plain\t", "X-A": "b\tc", "accept_encoding": "gzip", "User-Agent": "x"}
    )
    assert sending.headers == (("Content-Type", "text/plain"), ("X-A", "b\tc"))
    lines = outbound.stamped(sending, ROUTE, run="r1", task="a/b#1", fence=7)
    assert lines == [
        (b"Host", b"api.example.com"),
        (b"Content-Type", b"text/plain"),
        (b"X-A", b"b\tc"),
        (b"Accept-Encoding", b"identity"),
        (b"User-Agent", b"ifabric"),
        (b"X-Ifabric-Run", b"r1"),
        (b"X-Ifabric-Task", b"a%2Fb%231"),
        (b"X-Ifabric-Fence", b"7"),
    ]


def test_without_a_claim_there_is_no_fence_and_a_body_has_a_length_even_of_nothing() -> None:
    lines = dict(outbound.stamped(sent(method="POST"), ROUTE, run="r1", task=None, fence=None))
    assert lines[b"Content-Length"] == b"0"
    assert not any(name.startswith((b"X-Ifabric-Task", b"X-Ifabric-Fence")) for name in lines)


# -- endpoints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "origin", "port", "base"),
    [
        ("https://API.Example.com", "https://api.example.com", 443, ""),
        ("https://api.example.com:443/", "https://api.example.com", 443, ""),
        ("http://api.example.com:8080/v1/", "http://api.example.com:8080", 8080, "/v1"),
        ("http://[::1]:80/a/b", "http://[::1]", 80, "/a/b"),
        ("http://10.0.0.1", "http://10.0.0.1", 80, ""),
        ("https://bücher.example", "https://xn--bcher-kva.example", 443, ""),
    ],
)
def test_an_endpoint_is_read_once(url: str, origin: str, port: int, base: str) -> None:
    found = route(url)
    assert (found.origin, found.port, found.base) == (origin, port, base)


@pytest.mark.parametrize(
    "url",
    [
        "https://a:b", "https://a:99999", "https://a\\b", "https://[::1", "https://a..b", "https://-a", "https://a%2e/",
        "https://a/b/../c", "https://a/.", "https://a//b", "https://a/b;\u00e9", "https://" + "a" * 64, "https://:80",
    ],
)  # fmt: skip
def test_an_endpoint_that_no_request_can_be_made_to_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ConfigError, match="chassis.endpoints.api.url"):
        route(url)


@pytest.mark.parametrize("header", ["Host", "content-length", "Transfer-Encoding", "Accept-Encoding"])
def test_a_credential_cannot_take_the_place_of_what_the_request_stands_on(header: str) -> None:
    with pytest.raises(ConfigError, match="cannot carry a secret"):
        route(credential={**SECRET, "header": header})


def test_a_rate_allows_a_seconds_worth_at_once_and_then_as_much_as_comes() -> None:
    bucket = Bucket(10.0, 0.0)
    assert [bucket.take(0.0) for _ in range(10)] == [0.0] * 10
    assert bucket.take(0.0) == pytest.approx(0.1)
    assert bucket.take(0.05) == pytest.approx(0.05)
    assert bucket.take(0.1) == 0.0
    assert sum(bucket.take(100.0) == 0.0 for _ in range(50)) == 10


def test_a_rate_below_one_a_second_allows_one_at_once() -> None:
    bucket = Bucket(0.5, 0.0)
    assert (bucket.take(0.0), bucket.take(0.0), bucket.take(2.0)) == (0.0, 2.0, 0.0)


# -- redirects ----------------------------------------------------------------------------------------------------------


def to(location: str, status: int = 302, where: Route = ROUTE, **sending: Any) -> Sending | None:
    head = Head(status, ((b"location", location.encode("latin-1")),))
    return outbound.redirected(Sending(**{"method": "GET", "target": "/v1/files/a/b", **sending}), where, head)


def refused_redirect(where: Route, location: str, **how: Any) -> EgressDenied:
    with pytest.raises(EgressDenied) as caught:
        to(location, where=where, **how)
    return caught.value


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("https://api.example.com/v1/chat", "/v1/chat"),
        ("HTTPS://API.example.com:443/v1/chat?a=b#c", "/v1/chat?a=b"),
        ("//api.example.com/v1/files/x", "/v1/files/x"),
        ("/v1/files/x", "/v1/files/x"),
        ("x", "/v1/files/a/x"),
        ("../x", "/v1/files/x"),
        ("?x=1", "/v1/files/a/b?x=1"),
        ("https:/v1/chat", "/v1/chat"),
    ],
)
def test_a_redirect_within_the_endpoint_is_followed(location: str, target: str) -> None:
    sending = to(location)
    assert sending is not None
    assert sending.target == target


@pytest.mark.parametrize(
    "location",
    [
        "http://api.example.com/v1/chat",
        "https://api.example.com:8443/v1/chat",
        "http://api.example.com:443/v1/chat",
        "https://evil.example.com/v1/chat",
        "//evil.example.com/v1/chat",
        "///evil.example.com/v1/chat",
        "https://api.example.com@evil.example.com/v1/chat",
        "https://user@api.example.com/v1/chat",
        "https://api.example.com.evil.example.com/v1/chat",
        "https://api.example.com\\@evil.example.com/v1/chat",
        "https:\\\\evil.example.com/v1/chat",
        "/\\evil.example.com/v1/chat",
        "https://169.254.169.254/v1/chat",
        "https://api.example.com:99999/v1/chat",
        "https://[::1/v1/chat",
        "ftp://api.example.com/v1/chat",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "data:text/plain,x",
        "/v2/chat",
        "/v1chat",
        "/v1",
        "/chat",
        "/v1/other",
        "/v1/files/../other",
        "../../other",
        "/v1/files/%2e%2e/other",
        "/v1/files//x",
        "/v1/files/..;/other",
        "/v1/chat x",
        "/v1/chat\tx",
        "/v1/chat\x00",
        "/v1/caf\xe9",
        "/v1/files/" + "a" * 9000,
        "",
    ],
)
def test_a_redirect_that_leads_elsewhere_ends_the_run(location: str) -> None:
    assert refused_redirect(ROUTE, location).facts["why"].startswith("redirect")


@pytest.mark.parametrize("location", ["/v1", "/v1chat", "/v1?x", "/", "/v2/"])
def test_everything_below_the_url_is_not_the_url_itself(location: str) -> None:
    assert "out of /v1" in refused_redirect(route(), location).facts["why"]


@pytest.mark.parametrize(
    ("method", "status", "becomes"),
    [
        ("POST", 301, "GET"),
        ("POST", 302, "GET"),
        ("POST", 303, "GET"),
        ("POST", 307, "POST"),
        ("POST", 308, "POST"),
        ("PUT", 301, "PUT"),
        ("PUT", 302, "PUT"),
        ("PUT", 303, "GET"),
        ("GET", 303, "GET"),
        ("HEAD", 303, "HEAD"),
        ("HEAD", 301, "HEAD"),
        ("GET", 308, "GET"),
    ],
)
def test_a_redirect_changes_the_method_as_browsers_do(method: str, status: int, becomes: str) -> None:
    where = route(methods=("GET", "HEAD", "POST", "PUT"))
    headers = (("Content-Type", "x"), ("X-A", "y"))
    sending = to("/v1/x", status, where, method=method, headers=headers, body=b"body")
    kept = method == becomes
    assert sending == Sending(becomes, "/v1/x", headers if kept else headers[1:], b"body" if kept else b"")


def test_a_redirect_to_a_method_that_is_not_allowed_ends_the_run() -> None:
    assert "GET" in refused_redirect(route(methods=("POST",)), "/v1/x", status=303, method="POST").facts["why"]


@pytest.mark.parametrize("status", [200, 204, 300, 304, 305, 306, 404])
def test_other_statuses_lead_nowhere(status: int) -> None:
    assert to("https://evil.example.com/", status) is None


def test_a_redirect_without_a_location_is_a_response_and_one_with_two_ends_the_run() -> None:
    assert outbound.redirected(Sending("GET", "/"), ROUTE, Head(302, ())) is None
    two = Head(302, ((b"location", b"/v1/chat"), (b"location", b"/v1/chat")))
    with pytest.raises(EgressDenied, match="not one URL"):
        outbound.redirected(Sending("GET", "/"), ROUTE, two)


# -- responses ----------------------------------------------------------------------------------------------------------

FORMS = forms_of('sk-canary/+"&<1', 'Bearer sk-canary/+"&<1')


def told(head: Head, body: bytes = b"", forms: tuple[bytes, ...] = ()) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(outbound.answer(head, body, forms))
    return found


def test_a_response_is_text_where_it_is_and_base64_where_it_is_not() -> None:
    assert told(Head(200, ()), "é\0".encode()) == {"status": 200, "headers": {}, "body": "é\0"}
    assert told(Head(200, ()), b"\xff") == {"status": 200, "headers": {}, "body_b64": "/w=="}


def test_headers_of_one_connection_and_cookies_are_not_for_the_guest() -> None:
    headers = (
        (b"set-cookie", b"a=b"),
        (b"connection", b"close, X-Hop"),
        (b"x-hop", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"content-length", b"5"),
        (b"keep-alive", b"timeout=5"),
        (b"proxy-authenticate", b"Basic"),
        (b"upgrade", b"h2c"),
        (b"x-a", b"1"),
        (b"x-a", b"\xe9"),
        (b"content-type", b"text/plain"),
    )
    assert told(Head(200, headers))["headers"] == {"x-a": "1, é", "content-type": "text/plain"}


@pytest.mark.parametrize("coding", [b"gzip", b"br", b"identity, gzip", b"GZIP", b"x-anything", b"deflate,identity"])
def test_a_response_that_cannot_be_looked_into_is_refused(coding: bytes) -> None:
    with pytest.raises(Unavailable, match="compressed"):
        outbound.refuse_encoded(Head(200, ((b"content-encoding", coding),)), ROUTE)


@pytest.mark.parametrize("headers", [(), ((b"content-encoding", b"identity"),), ((b"content-encoding", b""),)])
def test_a_response_that_is_as_it_is_is_read(headers: Any) -> None:
    outbound.refuse_encoded(Head(200, headers), ROUTE)


def test_the_secret_is_taken_out_of_body_header_and_header_name() -> None:
    secret = b"sk-canary-0123456789"
    found = outbound.answer(Head(200, ((b"x-" + secret, b"<" + secret + b">"),)), b"a" + secret + b"b", (secret,))
    assert json.loads(found) == {"status": 200, "headers": {"x-[redacted]": "<[redacted]>"}, "body": "a[redacted]b"}


def test_what_is_not_utf8_is_scrubbed_before_it_is_put_into_base64() -> None:
    secret = b"sk-canary-0123456789"
    found = told(Head(200, ()), b"\xff" + secret, (secret,))
    assert base64.b64decode(found["body_b64"]) == b"\xff[redacted]"


def echoes(secret: str) -> list[bytes]:
    """How an endpoint may repeat it."""
    raw = secret.encode()
    pad = [bytes(before) + raw + b"\xff" * after for before in range(3) for after in range(3)]
    return [
        raw,
        json.dumps({"h": secret}).encode(),
        json.dumps({"h": secret}).replace("/", "\\/").encode(),
        quote(secret, safe="").encode(),
        quote(secret).encode(),
        quote_plus(secret).encode(),
        html.escape(secret).encode(),
        *(coded for text in pad for coded in (base64.b64encode(text), base64.urlsafe_b64encode(text))),
        *(base64.b64encode(text).rstrip(b"=") for text in pad),
    ]


VALUES = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=8, max_size=60)


@given(VALUES.filter(lambda text: text == text.strip()), st.binary(max_size=20), st.binary(max_size=20))
@example('sk-canary/+"&<1>%\\', b"", b"")
def test_no_form_of_a_secret_is_left(secret: str, before: bytes, after: bytes) -> None:
    assume(secret not in "[redacted]")
    whole = f"Bearer {secret}"
    forms = forms_of(secret, whole)
    for text in (secret, whole):
        for echo in echoes(text):
            clean = outbound.scrub(before + echo + b"|" + echo + echo + after, forms)
            assert not any(form in clean for form in forms)
            # nor enough of its base64 to tell what it was
            kept = base64.b64encode(secret.encode())[2:-4]
            assert len(kept) < 8 or kept not in clean


@given(st.lists(st.sampled_from([b"a", b"ab", b"aba", b"[redacted]", b"redacted", b"d]x", b"x[r"]), max_size=12))
def test_a_replacement_makes_no_secret_of_its_own(parts: list[bytes]) -> None:
    for forms in [(b"d]xd",), (b"aba", b"ab"), (b"]a", b"b["), (b"xx", b"x[re")]:
        clean = outbound.scrub(b"".join(parts), forms)
        assert clean == outbound.REDACTED or not any(form in clean for form in forms)


def test_a_secret_that_is_in_the_mark_itself_leaves_the_mark_alone() -> None:
    assert outbound.scrub(b"this is red.", (b"red",)) == b"[redacted]"


def test_a_text_without_the_secret_is_not_touched() -> None:
    body = bytes(range(256)) * 10
    assert outbound.scrub(body, FORMS) is body


def test_errors_are_scrubbed_in_all_that_they_say() -> None:
    forms = (b"secret-1",)
    said = {"why": "at secret-1", "list": ["secret-1", 1, None], "secret-1": {"x": "secret-1"}, "n": 1.5}
    assert outbound.scrubbed(said, forms) == {
        "why": "at [redacted]", "list": ["[redacted]", 1, None], "[redacted]": {"x": "[redacted]"}, "n": 1.5,
    }  # fmt: skip


# -- what it says of the endpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "said"),
    [
        *((status, "success") for status in (200, 204, 302, 304)),
        *((status, "ignored") for status in (400, 401, 404, 422)),
        *((status, "failure") for status in (408, 429, 500, 503, 599)),
    ],
)
def test_a_status_is_the_endpoints_trouble_or_the_guests(status: int, said: str) -> None:
    assert breaking.verdict(status) == said


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([], None),
        ([b"30"], 30.0),
        ([b" 30 "], 30.0),
        ([b"0"], 0.0),
        ([b"999999999"], 86_400.0),
        ([b"-1"], None),
        ([b"1e9"], None),
        ([b"soon"], None),
        ([b""], None),
        ([b"Thu, 01 Jan 1970 00:02:00 GMT"], 60.0),
        ([b"Thu, 01 Jan 1970 00:00:30 GMT"], 0.0),
        ([b"Thu, 99 Jan 1970 00:00:30 GMT"], None),
        ([b"\xff"], None),
    ],
)
def test_retry_after_is_a_number_or_a_date(values: list[bytes], seconds: float | None) -> None:
    assert breaking.retry_after_s(values, 60_000) == seconds


def test_a_path_is_at_fault_before_it_is_allowed() -> None:
    assert path_fault("/a") is None
    assert path_fault("/a/../b") == "has a segment that is empty or of dots"
