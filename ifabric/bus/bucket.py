"""The stream below a bucket of objects: its messages, who is believed among them, and JetStream's own requests.

**A naming message is hostile**: whoever may put here may write any. Its `nuid` becomes part of a subject that is
purged, so it has to be a plain word; its size is not believed beyond itself; links are not followed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
import nats.errors
import nats.js.errors
from msgspec import Struct
from nats.aio.client import Client

from ifabric.bus.base import ObjectDamaged, ObjectInfo
from ifabric.cancellation import heard
from ifabric.errors import BadRequest

#: one request to JetStream
ACK_S = 5.0
NAME_MAX_BYTES = 512
#: of one object, as far as a naming message is believed
SIZE_MAX_BYTES = 1 << 40
#: requests that may be under way when many objects are asked about
WINDOW = 64
NO_MESSAGE = 10037
#: "no message found", and what deleting one answers that has gone
GONE = (NO_MESSAGE, 10043, 10057)
_NUID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_API = "$JS.API."


class _Options(Struct):
    link: Any = None


class Meta(Struct):
    """The message about an object, as far as it is believed."""

    name: str
    nuid: str
    size: int = 0
    digest: str | None = None
    deleted: bool | None = False
    description: str | None = None
    options: _Options | None = None


class Stored(NamedTuple):
    """A message of the stream."""

    data: bytes
    seq: int
    #: by the server's clock; 0 when nobody asked
    at_ms: int


class Live(NamedTuple):
    """An object that is there: what its message says, and which message that is."""

    meta: Meta
    seq: int
    at_ms: int

    @property
    def info(self) -> ObjectInfo:
        """As the seam has it."""
        return ObjectInfo(self.meta.name, self.meta.size, self.at_ms, self.meta.description or "")


_META = msgspec.json.Decoder(Meta)


def decoded(stored: Stored | None) -> Meta | None:
    """What the message says, if it is one that is believed."""
    if stored is None:
        return None
    try:
        meta = _META.decode(stored.data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    linked = meta.options is not None and meta.options.link is not None
    return meta if not linked and 0 <= meta.size <= SIZE_MAX_BYTES and _NUID.fullmatch(meta.nuid) else None


class Bucket:
    """The stream of one bucket. Raises what nats-py raises."""

    def __init__(self, client: Client, context: Any, name: str) -> None:
        self._client, self._context = client, context
        self.name, self.stream = name, f"OBJ_{name}"

    # -- subjects --------------------------------------------------------------------------------------------------

    def chunks(self, nuid: str) -> str:
        """The subject of an object's chunks."""
        return f"$O.{self.name}.C.{nuid}"

    def about(self, name: str) -> str:
        """The subject of the message about an object. Raises `BadRequest` when the name is not one."""
        raw = name.encode()
        if not 0 < len(raw) <= NAME_MAX_BYTES:
            raise BadRequest(f"an object's name has 1 to {NAME_MAX_BYTES} bytes, and this one {len(raw)}")
        return f"$O.{self.name}.M.{base64.urlsafe_b64encode(raw).decode()}"

    async def names(self) -> list[str]:
        """Of everything that there is a message about, other clients' tombstones included."""
        found: list[str] = []
        for subject in await self._subjects("M"):
            with contextlib.suppress(binascii.Error, UnicodeDecodeError, BadRequest):
                name = base64.urlsafe_b64decode(subject.rpartition(".")[2]).decode()
                if self.about(name) == subject:
                    found.append(name)
        return found

    async def nuids(self) -> set[str]:
        """Of everything that there are chunks of; only those that a naming message may name."""
        found = {subject.rpartition(".")[2] for subject in await self._subjects("C")}
        return {nuid for nuid in found if _NUID.fullmatch(nuid)}

    async def _subjects(self, kind: str) -> list[str]:
        found: list[str] = []
        while True:
            asked = {"subjects_filter": f"$O.{self.name}.{kind}.>", "offset": len(found)}
            answer = await self._ask(f"STREAM.INFO.{self.stream}", asked)
            page = answer["state"].get("subjects") or {}
            found += page
            if not page or len(found) >= answer.get("total", 0):
                return found

    # -- messages ----------------------------------------------------------------------------------------------------

    async def live(self, name: str) -> Live | None:
        """The object of this name. Raises `ObjectDamaged` when its message is not one that is believed."""
        stored = await self.last(self.about(name))
        if stored is None:
            return None
        meta = decoded(stored)
        if meta is None or meta.name != name:
            raise ObjectDamaged(f"what {self.name} says about {name} cannot be read")
        return None if meta.deleted else Live(meta, stored.seq, stored.at_ms)

    async def all_live(self, names: Sequence[str]) -> list[Live]:
        """Those of them that are there, and whose messages are believed."""

        async def one(name: str) -> Live | None:
            with contextlib.suppress(ObjectDamaged):
                return await self.live(name)
            return None

        found: list[Live] = []
        for at in range(0, len(names), WINDOW):
            window = await asyncio.gather(*(one(name) for name in names[at : at + WINDOW]))
            found += [live for live in window if live is not None]
        return found

    async def last(self, subject: str) -> Stored | None:
        """The newest message on a subject, from the stream's leader."""
        return await self._message({"last_by_subj": subject})

    async def next(self, subject: str, seq: int) -> Stored | None:
        """The first message on a subject from `seq` on: from whichever server has it, or else from the leader."""
        asked = {"seq": seq, "next_by_subj": subject}
        with contextlib.suppress(nats.errors.NoRespondersError):
            answer = await heard(
                self._client.request(f"{_API}DIRECT.GET.{self.stream}", msgspec.json.encode(asked), timeout=ACK_S)
            )
            number = (answer.headers or {}).get("Nats-Sequence")
            if number is not None:
                return Stored(answer.data, int(number), 0)
        return await self._message(asked)

    async def _message(self, asked: dict[str, Any]) -> Stored | None:
        try:
            message = (await self._ask(f"STREAM.MSG.GET.{self.stream}", asked))["message"]
        except nats.js.errors.NotFoundError as error:
            if error.err_code != NO_MESSAGE:
                raise
            return None
        at = datetime.fromisoformat(message["time"])
        return Stored(base64.b64decode(message.get("data", "")), message["seq"], int(at.timestamp() * 1000))

    async def _ask(self, verb: str, asked: dict[str, Any]) -> Any:
        """JetStream's answer to a request of its API."""
        message = await heard(self._client.request(_API + verb, msgspec.json.encode(asked), timeout=ACK_S))
        answer = msgspec.json.decode(message.data)
        if "error" in answer:
            nats.js.errors.APIError.from_error(answer["error"])
        return answer

    async def publish(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        """Returns when the stream has stored it."""
        await heard(self._context.publish(subject, data, timeout=ACK_S, stream=self.stream, headers=headers))

    async def erase(self, seq: int) -> bool:
        """Deletes one message. False: it had gone."""
        try:
            await heard(self._context.delete_msg(self.stream, seq))
        except nats.js.errors.APIError as error:
            if error.code == 404 or error.err_code in GONE:
                return False
            raise
        return True

    async def purge(self, nuid: str) -> None:
        """Frees an object's chunks."""
        await heard(self._context.purge_stream(self.stream, subject=self.chunks(nuid)))

    async def purge_if_possible(self, nuid: str) -> None:
        """As `purge`; what cannot be freed now is found by a sweep."""
        with contextlib.suppress(nats.errors.Error, OSError):
            await self.purge(nuid)
