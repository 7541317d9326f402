"""Objects: blobs in a JetStream stream, as NATS's object store lays them out (ADR-20).

The layout is everybody's: an object is a message about it (`$O.<bucket>.M.<name in base64>`) that names the subject
of its chunks (`$O.<bucket>.C.<nuid>`), and other clients read and write the same buckets. The calls are our own, since
nats-py 2.16 reads in quadratic time (32 MB: 2.3 s, here 0.1 s), waits for ever when a chunk is missing, destroys the
object when the acknowledgement of a put is lost, and leaves a tombstone for each object that was ever deleted.

**Order is all the safety there is.** Chunks first, under a subject that nobody knows; then the message that names
them, which is the moment of the put; then the chunks of the version before are purged. What dies in between leaves
chunks that nobody names, and `sweep` finds them. When it is not known whether the naming message was stored, its chunks
stay.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
from collections.abc import AsyncIterator, Iterator, Sequence

import msgspec
import nats.errors
import nats.js.api as js
import nats.js.errors
from nats.aio.client import Client
from nats.nuid import NUID

from ifabric.bus.base import ObjectDamaged, ObjectInfo, ObjectSpec
from ifabric.bus.bucket import ACK_S, WINDOW, Bucket, Meta, Stored, decoded
from ifabric.bus.hardened import PermissionsViolation
from ifabric.bus.streams import made
from ifabric.cancellation import heard
from ifabric.errors import Forbidden, StoreFull, TooLarge, Unavailable

#: one call of the seam, whatever it takes
CALL_S = 60.0
CHUNK = 128 * 1024
_DIGEST = "SHA-256="
#: "maximum bytes exceeded", "insufficient storage resources", "insufficient resources"
_FULL = (10077, 10047, 10023)
#: what a bucket that is there already is brought up to
_KEPT_UP = ("description", "subjects", "max_bytes", "num_replicas", "discard", "allow_rollup_hdrs", "allow_direct")


async def open_objects(client: Client, spec: ObjectSpec | str) -> JetStreamObjects:
    """The bucket as specified, created or brought up to date; by name alone, as it is.

    Raises `Unavailable`, and `Forbidden` when the server does not allow it.
    """
    context = client.jetstream(timeout=ACK_S)
    name = spec if isinstance(spec, str) else spec.name
    with _translated(name):
        if isinstance(spec, str):
            await heard(context.stream_info(f"OBJ_{name}"))
            return JetStreamObjects(Bucket(client, context, name))
        config = js.StreamConfig(
            name=f"OBJ_{name}",
            description=spec.description or None,
            subjects=[f"$O.{name}.C.>", f"$O.{name}.M.>"],
            max_bytes=spec.max_bytes,
            num_replicas=spec.replicas,
            storage=js.StorageType.FILE,
            discard=js.DiscardPolicy.NEW,
            allow_rollup_hdrs=True,
            allow_direct=True,
        )
        await made(context, config, _KEPT_UP)
    return JetStreamObjects(Bucket(client, context, name))


@contextlib.contextmanager
def _translated(bucket: str) -> Iterator[None]:
    """The one table from JetStream's errors to ours."""
    try:
        yield
    except nats.js.errors.APIError as error:
        if error.err_code in _FULL:
            raise StoreFull(
                f"the bucket {bucket} has no room ({error.description}); nothing was kept",
                what="jetstream",
                bucket=bucket,
            ) from None
        raise _unavailable(error) from None
    except PermissionsViolation as error:
        raise Forbidden(f"{error}: this session may not use the bucket {bucket}", what="nats", bucket=bucket) from None
    except (nats.errors.Error, OSError) as error:
        raise _unavailable(error) from None


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable(f"JetStream does not answer: {error or type(error).__name__}", what="jetstream")


class JetStreamObjects:
    """One bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @contextlib.asynccontextmanager
    async def _call(self) -> AsyncIterator[Bucket]:
        """Whatever a call of the seam awaits, within its time and with its errors translated."""
        with _translated(self._bucket.name):
            async with asyncio.timeout(CALL_S):
                yield self._bucket

    async def put(self, name: str, data: bytes, description: str = "") -> None:
        async with self._call() as bucket:
            subject = bucket.about(name)
            before = await bucket.last(subject)
            nuid = NUID().next().decode()
            digest = hashlib.sha256()
            try:
                for at in range(0, len(data), CHUNK):
                    chunk = data[at : at + CHUNK]
                    digest.update(chunk)
                    await bucket.publish(bucket.chunks(nuid), chunk)
            except (nats.errors.Error, OSError):
                await bucket.purge_if_possible(nuid)
                raise
            about = {
                "name": name,
                "description": description,
                "bucket": bucket.name,
                "nuid": nuid,
                "size": len(data),
                "chunks": -(-len(data) // CHUNK),
                "digest": _DIGEST + base64.urlsafe_b64encode(digest.digest()).decode(),
                "options": {"max_chunk_size": CHUNK},
            }
            try:
                # "roll up": this message takes the place of all others on its subject
                await bucket.publish(subject, msgspec.json.encode(about), {js.Header.ROLLUP: "sub"})
            except nats.js.errors.APIError:  # refused; after any other error it may have been stored
                await bucket.purge_if_possible(nuid)
                raise
            old = _chunks_of(before)
            if old is not None:
                await bucket.purge_if_possible(old)

    async def get(self, name: str, *, max_bytes: int | None = None) -> bytes | None:
        async with self._call() as bucket:
            found = await bucket.live(name)
            while found is not None:
                size = found.meta.size
                if max_bytes is not None and size > max_bytes:
                    raise TooLarge(f"{name} has {size} bytes, and {max_bytes} are allowed", size=size, max=max_bytes)
                data = await _read(bucket, found.meta)
                if data is not None:
                    return data
                now = await bucket.live(name)
                if now is not None and now.seq == found.seq:
                    raise ObjectDamaged(f"{name} in {bucket.name} is not what was put: its digest is another")
                found = now  # it was replaced while it was read
            return None

    async def info(self, name: str) -> ObjectInfo | None:
        async with self._call() as bucket:
            found = await bucket.live(name)
            return None if found is None else found.info

    async def page(self, *, prefix: str = "", after: str = "", limit: int | None = None) -> Sequence[ObjectInfo]:
        async with self._call() as bucket:
            names = sorted(name for name in await bucket.names() if name.startswith(prefix) and name > after)
            found: list[ObjectInfo] = []
            while names and (limit is None or len(found) < limit):
                window = WINDOW if limit is None else min(WINDOW, limit - len(found))
                asked, names = names[:window], names[window:]
                found += [live.info for live in await bucket.all_live(asked)]
            return found

    async def delete(self, name: str) -> bool:
        async with self._call() as bucket:
            stored = await bucket.last(bucket.about(name))
            if stored is None:
                return False
            meta = decoded(stored)
            if not await bucket.erase(stored.seq):
                return True  # somebody else deleted or replaced it just now, and purged its chunks
            old = _chunks_of(stored)
            if old is not None:
                await bucket.purge(old)
            return not (meta is not None and meta.deleted)

    async def sweep(self, before_ms: int) -> int:
        async with self._call() as bucket:
            # chunks before names: what is named later is not yet among them
            left = await bucket.nuids()
            left -= {live.meta.nuid for live in await bucket.all_live(await bucket.names())}
            swept = 0
            for nuid in left:
                last = await bucket.last(bucket.chunks(nuid))
                if last is not None and last.at_ms < before_ms:
                    await bucket.purge(nuid)
                    swept += 1
            return swept


def _chunks_of(stored: Stored | None) -> str | None:
    """The nuid of the chunks that go with a naming message."""
    meta = decoded(stored)
    return None if meta is None or meta.deleted else meta.nuid


async def _read(bucket: Bucket, meta: Meta) -> bytes | None:
    """An object's bytes; None when they are not those that the digest is of."""
    subject, seq, size = bucket.chunks(meta.nuid), 1, 0
    parts: list[bytes] = []
    digest = hashlib.sha256()
    while size < meta.size:
        chunk = await bucket.next(subject, seq)
        if chunk is None or not chunk.data:
            return None
        parts.append(chunk.data)
        digest.update(chunk.data)
        size, seq = size + len(chunk.data), chunk.seq + 1
    claimed = (meta.digest or "").removeprefix(_DIGEST).rstrip("=")
    real = base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
    same = size == meta.size and hmac.compare_digest(claimed.encode(), real.encode())
    return b"".join(parts) if same else None
