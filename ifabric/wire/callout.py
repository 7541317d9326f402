"""NATS's auth callout: what a server asks about a connection, and the answer that says who it is.

Both are JSON web tokens signed with nkeys (`ed25519-nkey`). The server hands over what the client sent to prove itself:
its public key, and its signature of a nonce that the server made for this connection. **Checking that signature is
ours**: a server that asks a callout does not do it. Source: nats-io/jwt v2, ADR-26.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any, NamedTuple

import msgspec
import nkeys
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from ifabric.errors import BadRequest
from ifabric.wire.permissions import SUBSCRIPTIONS_MAX, Permissions

SUBJECT = "$SYS.REQ.USER.AUTH"
#: a token longer than this is nobody's request
TOKEN_MAX_BYTES = 256 * 1024
_HEADER = {"typ": "JWT", "alg": "ed25519-nkey"}
_USER_PREFIX = nkeys.PREFIX_BYTE_USER


class Asked(NamedTuple):
    """A connection that wants in."""

    server: str
    #: the key that the answer must be about, made by the server for this connection
    user: str
    #: the client's public key; "" when it gave none
    public_key: str
    signature: str
    nonce: str
    host: str
    name: str


class _Server(msgspec.Struct):
    id: str


class _Client(msgspec.Struct):
    host: str = ""
    nonce: str = ""
    name: str = ""


class _Connect(msgspec.Struct):
    nkey: str = ""
    sig: str = ""
    name: str = ""


class _Request(msgspec.Struct):
    server_id: _Server
    user_nkey: str
    client_info: _Client = msgspec.field(default_factory=_Client)
    connect_opts: _Connect = msgspec.field(default_factory=_Connect)
    type: str = ""


class _Claims(msgspec.Struct):
    nats: _Request


_claims = msgspec.json.Decoder(_Claims)


def read(token: bytes) -> Asked:
    """What a server asks. `BadRequest` when it is not such a question."""
    parts = token.split(b".")
    if len(token) > TOKEN_MAX_BYTES or len(parts) != 3:
        raise BadRequest("an auth callout carries one JSON web token")
    try:
        asked = _claims.decode(_decoded(parts[1])).nats
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadRequest(f"the token of an auth callout cannot be read: {error}") from None
    if asked.type != "authorization_request":
        raise BadRequest(f"the token is a {asked.type[:40]!r}, and not an authorization request")
    options, client = asked.connect_opts, asked.client_info
    return Asked(
        asked.server_id.id,
        asked.user_nkey,
        options.nkey,
        options.sig,
        client.nonce,
        client.host,
        (options.name or client.name)[:80],
    )


def is_proven(asked: Asked) -> bool:
    """Whether the client has the private half of the key that it named."""
    try:
        raw = base64.b32decode(asked.public_key + "=" * (-len(asked.public_key) % 8))
        key, checksum = raw[1:33], int.from_bytes(raw[33:], "little")
        if len(raw) != 35 or raw[0] != _USER_PREFIX or nkeys.crc16(raw[:33]) != checksum or not asked.nonce:
            return False
        VerifyKey(key).verify(asked.nonce.encode(), _decoded(asked.signature.encode()))
    except (ValueError, BadSignatureError):
        return False
    return True


def granted(asked: Asked, *, name: str, may: Permissions, account: str, issuer: str, now_s: int) -> bytes:
    """The answer that lets the connection in, as `name`; `issuer` is the seed of the account key that signs."""
    user = {
        "sub": asked.user,
        "aud": account,
        "name": name,
        "nats": {
            "type": "user",
            "version": 2,
            "pub": {"allow": list(may.publish)},
            "sub": {"allow": list(may.subscribe)},
            "subs": SUBSCRIPTIONS_MAX,
            "data": -1,
            "payload": -1,
        },
    }
    return _answer(asked, {"jwt": _signed(user, issuer, now_s).decode()}, issuer, now_s)


def refused(asked: Asked, why: str, *, issuer: str, now_s: int) -> bytes:
    """The answer that does not. The server logs `why`; the client hears only that it is not authorized."""
    return _answer(asked, {"error": why}, issuer, now_s)


def _answer(asked: Asked, body: dict[str, Any], issuer: str, now_s: int) -> bytes:
    claims = {
        "sub": asked.user,
        "aud": asked.server,
        "nats": {"type": "authorization_response", "version": 2, **body},
    }
    return _signed(claims, issuer, now_s)


def _signed(claims: dict[str, Any], seed: str, now_s: int) -> bytes:
    pair = nkeys.from_seed(bytearray(seed.encode()))
    claims = {**claims, "iss": pair.public_key.decode(), "iat": now_s, "jti": ""}
    digest = hashlib.sha256(msgspec.json.encode(claims)).digest()
    claims["jti"] = base64.b32encode(digest).decode().rstrip("=")
    signed = _encoded(msgspec.json.encode(_HEADER)) + b"." + _encoded(msgspec.json.encode(claims))
    return signed + b"." + _encoded(bytes(pair.sign(signed)))


def _encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def _decoded(text: bytes) -> bytes:
    """Base64 of either alphabet, with or without its padding: clients differ."""
    plain = text.rstrip(b"=").replace(b"+", b"-").replace(b"/", b"_")
    return base64.urlsafe_b64decode(plain + b"=" * (-len(plain) % 4))
