"""The objects' twin: buckets in memory, with faults on demand. `tests/conformance/test_objects.py` holds it to NATS."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ifabric.bus.base import ObjectDamaged, ObjectInfo, ObjectSpec
from ifabric.clock import Clock, SystemClock
from ifabric.errors import BadRequest, StoreFull, TooLarge, Unavailable

NAME_MAX_BYTES = 512
#: what an object takes besides its bytes, about
OVERHEAD_BYTES = 512


@dataclass
class _Object:
    info: ObjectInfo
    data: bytes
    digest: bytes


@dataclass
class MemoryBucket:
    """What all connections see of one bucket."""

    spec: ObjectSpec
    #: where `modified_ms` comes from; a test puts its own here
    clock: Clock = field(default_factory=SystemClock)
    objects: dict[str, _Object] = field(default_factory=dict)
    #: (when, bytes) of what interrupted puts have left
    left: list[tuple[int, int]] = field(default_factory=list)
    #: faults: that many next puts break off half way
    interrupt_puts: int = 0

    @property
    def used_bytes(self) -> int:
        """Of the spec's `max_bytes`."""
        stored = sum(len(one.data) + OVERHEAD_BYTES for one in self.objects.values())
        return stored + sum(size for _, size in self.left)

    def damage(self, name: str) -> None:
        """A fault: one byte of the object is another."""
        one = self.objects[name]
        one.data = bytes([one.data[0] ^ 1]) + one.data[1:]


class MemoryObjects:
    """One connection's view."""

    def __init__(self, bucket: MemoryBucket, check: Callable[[], None]) -> None:
        self.bucket, self._check = bucket, check

    def _find(self, name: str) -> _Object | None:
        self._check()
        if not 0 < len(name.encode()) <= NAME_MAX_BYTES:
            raise BadRequest(f"an object's name has 1 to {NAME_MAX_BYTES} bytes, and this one {len(name.encode())}")
        return self.bucket.objects.get(name)

    async def put(self, name: str, data: bytes, description: str = "") -> None:
        self._find(name)
        bucket = self.bucket
        if bucket.used_bytes + len(data) + OVERHEAD_BYTES > bucket.spec.max_bytes:
            raise StoreFull(
                f"the bucket {bucket.spec.name} has no room; nothing was kept",
                what="jetstream",
                bucket=bucket.spec.name,
            )
        now = bucket.clock.wall_ms()
        if bucket.interrupt_puts:
            bucket.interrupt_puts -= 1
            bucket.left.append((now, len(data) // 2))
            raise Unavailable("JetStream does not answer: the connection broke", what="jetstream")
        info = ObjectInfo(name, len(data), now, description)
        bucket.objects[name] = _Object(info, bytes(data), hashlib.sha256(data).digest())

    async def get(self, name: str, *, max_bytes: int | None = None) -> bytes | None:
        found = self._find(name)
        if found is None:
            return None
        size = found.info.size
        if max_bytes is not None and size > max_bytes:
            raise TooLarge(f"{name} has {size} bytes, and {max_bytes} are allowed", size=size, max=max_bytes)
        if hashlib.sha256(found.data).digest() != found.digest:
            raise ObjectDamaged(f"{name} in {self.bucket.spec.name} is not what was put: its digest is another")
        return found.data

    async def info(self, name: str) -> ObjectInfo | None:
        found = self._find(name)
        return None if found is None else found.info

    async def page(self, *, prefix: str = "", after: str = "", limit: int | None = None) -> Sequence[ObjectInfo]:
        self._check()
        names = sorted(name for name in self.bucket.objects if name.startswith(prefix) and name > after)
        return [self.bucket.objects[name].info for name in names[:limit]]

    async def delete(self, name: str) -> bool:
        self._find(name)
        return self.bucket.objects.pop(name, None) is not None

    async def sweep(self, before_ms: int) -> int:
        self._check()
        kept = [one for one in self.bucket.left if one[0] >= before_ms]
        swept = len(self.bucket.left) - len(kept)
        self.bucket.left = kept
        return swept
