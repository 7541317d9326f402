"""What the chassis stores in etcd, and under which keys.

    chassis/daemons/<daemon>            a daemon that has a chassis; hangs on a lease that it keeps alive
    chassis/runs/<run>                  a run that has lasted longer than a second; hangs on its daemon's lease
    chassis/kills/<run>                 an operator wants it ended; forgotten by itself
    chassis/once/<session>/<request>    a run with effects: begun, or what came of it; forgotten by itself
    chassis/uploads/<session>           which parts of which modules a session has uploaded; forgotten by itself

A run that is over within a second leaves nothing in etcd, unless it has effects: etcd would be what limits them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ifabric.wire.envelope import Mutation, encode

DAEMONS, RUNS, KILLS, ONCE = b"chassis/daemons/", b"chassis/runs/", b"chassis/kills/", b"chassis/once/"
UPLOADS = b"chassis/uploads/"


class Running(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run that is on. `at` and `ends` in ms since the epoch."""

    run: str
    session: str
    module: str
    daemon: str
    at: int
    ends: int
    task: str | None = None


class Kill(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who wants a run ended, and why."""

    by: str
    why: str = ""


class Once(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run with effects. Without an answer it is on, or its daemon died."""

    #: of the request, to tell another one with the same id
    digest: str
    daemon: str
    run: str
    ended: Literal["", "reply", "error"] = ""
    #: the reply, or the error's body
    answer: msgspec.Raw = msgspec.Raw(b"null")


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A part of a module, as it lies in the object store."""

    size: int
    #: of its bytes, to tell another part in the same place
    digest: str
    object: str


class Upload(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A module that is on its way, or (`module`) what its parts were kept as. `at` in ms since the epoch."""

    #: when its latest part came, or when it was kept
    at: int
    parts: dict[int, Part] = {}
    #: the place of the last part, once that has come
    last: int | None = None
    #: of the whole, as announced
    sha256: str = ""
    module: str = ""


class Uploads(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A session's uploads by their names."""

    uploads: dict[str, Upload] = {}


running = msgspec.json.Decoder(Running)
kill = msgspec.json.Decoder(Kill)
once = msgspec.json.Decoder(Once)
uploads = msgspec.json.Decoder(Uploads)


def once_key(session: str, message: Mutation) -> bytes:
    """Where a run with effects is kept."""
    assert message.request_id is not None, "only a request with an id is kept"
    return b"%s%s/%s" % (ONCE, session.encode(), message.request_id.encode())


def key(prefix: bytes, name: str) -> bytes:
    """A key of one of the other kinds."""
    return prefix + name.encode()


def value(record: msgspec.Struct) -> bytes:
    """A record as etcd keeps it."""
    return encode(record)
