"""What becomes of a part of an upload: decided from what the session has uploaded so far, and nothing else.

**The place of a part belongs to the first data that comes for it.** The same again is one part, other data a
`conflict`; so a retry is harmless, whichever daemon it reaches, and two clients under one name notice.

**A session has room for one module of the largest size**, in at most `OPEN_MAX` uploads. What it does not go on with
(its program died) gives way to what it begins next, after a moment in which a slow part may still come.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec

from ifabric.errors import BadRequest, Conflict, Overloaded, TooLarge
from ifabric.wire import chassis as wire
from ifabric_actors.chassis.records import Part, Upload, Uploads

#: uploads of one session that are on at once
OPEN_MAX = 4
#: uploads that were kept, for a put that is repeated
KEPT_MAX = 16
#: without a new part, an upload is forgotten after so long, and gives way to another of its session much sooner
IDLE_MS, GIVES_WAY_MS = 300_000, 4_000
KEPT_MS = 3_600_000
#: missing parts that a refusal names in its facts, and in its sentence
MISSING_MAX, NAMED_MAX = 100, 8


class Added(NamedTuple):
    """What a part makes of the session's uploads."""

    uploads: Uploads
    reply: wire.UploadReply
    #: the uploads that were forgotten for it
    dropped: tuple[Upload, ...] = ()


def added(before: Uploads, message: wire.Upload, part: Part, now_ms: int, *, max_bytes: int) -> Added:
    """With one more part. Raises `Conflict`, `BadRequest`, `TooLarge`, `Overloaded`.

    max_bytes: of one module, and of all that the session has under way.
    """
    name = message.upload
    kept, dropped = _fresh(before.uploads, now_ms, except_for=name)
    old = kept.get(name, Upload(at=now_ms))
    if old.module:
        raise Conflict(
            f"upload {name} was put already, as {old.module}; take another name for another module", upload=name
        )
    new = _with(old, message, part, now_ms)
    size = size_of(new)
    if size > max_bytes:
        raise TooLarge(
            f"upload {name} would have {size} bytes, and a module has {max_bytes} at most; the part was not kept",
            size=size,
            max=max_bytes,
        )
    reply = wire.UploadReply(
        upload=name, part=message.part, parts=len(new.parts), size=size, again=message.part in old.parts
    )
    if reply.again and (new.last, new.sha256) == (old.last, old.sha256):
        return Added(before, reply)
    kept[name] = new
    dropped += _given_way(kept, name, now_ms, max_bytes)
    return Added(Uploads(uploads=kept), reply, dropped)


def _with(old: Upload, message: wire.Upload, part: Part, now_ms: int) -> Upload:
    """The upload with one more part, if that goes together."""
    name, number, there = message.upload, message.part, old.parts.get(message.part)
    if there is not None and (there.size, there.digest) != (part.size, part.digest):
        raise Conflict(f"part {number} of upload {name} came before, with other data", upload=name, part=number)
    if message.sha256 is not None and old.sha256 not in ("", message.sha256):
        raise Conflict(f"upload {name} was announced as another module, {old.sha256}", upload=name, part=number)
    last = old.last
    if message.last:
        if last not in (None, number):
            raise Conflict(f"part {last} of upload {name} was the last one, and now {number}", upload=name, part=number)
        last = number
    beyond = max([number, *old.parts])
    if last is not None and beyond > last:
        raise BadRequest(
            f"part {last} of upload {name} is its last one, and there is a part {beyond}; the part was not kept",
            upload=name,
            part=number,
        )
    return Upload(
        at=now_ms,
        parts={number: part, **old.parts},  # what was there stays
        last=last,
        sha256=message.sha256 or old.sha256,
    )


def _fresh(
    uploads: Mapping[str, Upload], now_ms: int, *, except_for: str = ""
) -> tuple[dict[str, Upload], tuple[Upload, ...]]:
    """Those that are remembered still, and those that are not."""
    kept: dict[str, Upload] = {}
    dropped: list[Upload] = []
    for name, upload in uploads.items():
        if name != except_for and now_ms - upload.at > (KEPT_MS if upload.module else IDLE_MS):
            dropped.append(upload)
        else:
            kept[name] = upload
    done = sorted((one.at, name) for name, one in kept.items() if one.module and name != except_for)
    for _, name in done[: max(0, len(done) - KEPT_MAX)]:
        del kept[name]
    return kept, tuple(dropped)


def _given_way(uploads: dict[str, Upload], name: str, now_ms: int, max_bytes: int) -> tuple[Upload, ...]:
    """Takes out what has to give way to an upload, the longest idle first. `Overloaded` when that is not enough."""
    on = {key: one for key, one in uploads.items() if not one.module}
    idle = sorted((one.at, key) for key, one in on.items() if key != name and now_ms - one.at > GIVES_WAY_MS)
    dropped: list[Upload] = []
    while len(on) > OPEN_MAX or sum(map(size_of, on.values())) > max_bytes:
        if not idle:
            raise Overloaded(
                f"this session uploads {len(on)} modules at once, and may {OPEN_MAX}, of {max_bytes} bytes together; "
                "the part was not kept: finish another upload first",
                uploads=len(on),
                max=OPEN_MAX,
                max_bytes=max_bytes,
            )
        _, key = idle.pop(0)
        dropped.append(on.pop(key))
        del uploads[key]
    return tuple(dropped)


def size_of(upload: Upload) -> int:
    """The bytes of its parts."""
    return sum(part.size for part in upload.parts.values())


def whole(name: str, upload: Upload | None) -> tuple[Part, ...]:
    """The parts in their order. `BadRequest` names those that are missing."""
    if upload is None:
        raise BadRequest(
            f"this session has uploaded nothing as {name}, or did not go on with it; send its parts with `upload`, and "
            "put it again",
            upload=name,
        )
    end = max(upload.parts, default=-1) if upload.last is None else upload.last
    missing = [number for number in range(end + 1) if number not in upload.parts]
    if missing or upload.last is None:
        wanted = [f"part {number}" for number in missing[:NAMED_MAX]]
        if len(missing) > NAMED_MAX:
            wanted.append(f"{len(missing) - NAMED_MAX} more")
        if upload.last is None:
            wanted.append("the one that is marked as the last")
        raise BadRequest(
            f"upload {name} is not whole: {', '.join(wanted)} did not come; send what is missing, and put it again",
            upload=name,
            missing=missing[:MISSING_MAX],
            last=upload.last,
        )
    return tuple(upload.parts[number] for number in range(end + 1))


def without(before: Uploads, name: str, lost: Collection[Part]) -> Uploads:
    """Without parts that were lost: they may be sent again."""
    old = before.uploads.get(name)
    if old is None:
        return before
    left = {number: part for number, part in old.parts.items() if part not in lost}
    return Uploads(uploads={**before.uploads, name: msgspec.structs.replace(old, parts=left)})


def settled(before: Uploads, name: str, module: str | None, now_ms: int) -> Uploads:
    """With an upload that is over; of one that was kept, its name goes on to stand for the module."""
    uploads = {key: one for key, one in before.uploads.items() if key != name}
    if module is not None:
        uploads[name] = Upload(at=now_ms, module=module)
    kept, _ = _fresh(uploads, now_ms, except_for=name)
    return Uploads(uploads=kept)


def swept(before: Uploads, now_ms: int) -> Uploads:
    """Without those that nobody goes on with."""
    kept, _ = _fresh(before.uploads, now_ms)
    return Uploads(uploads=kept)
