"""HighwayHash-64, which nats-server puts behind every record of a block, after google/highwayhash's portable C."""

from __future__ import annotations

import struct

MASK = (1 << 64) - 1
_MUL0 = (0xDBE6D5D5FE4CCE2F, 0xA4093822299F31D0, 0x13198A2E03707344, 0x243F6A8885A308D3)
_MUL1 = (0x3BD39E10CB0EF593, 0xC0ACF169B5F18A8C, 0xBE5466CF34E90C6C, 0x452821E638D01377)


def _turned(lane: int) -> int:
    return (lane >> 32) | ((lane << 32) & MASK)


class _State:
    def __init__(self, key: bytes) -> None:
        lanes = struct.unpack("<4Q", key)
        self.mul0, self.mul1 = list(_MUL0), list(_MUL1)
        self.v0 = [mul ^ lane for mul, lane in zip(_MUL0, lanes, strict=True)]
        self.v1 = [mul ^ _turned(lane) for mul, lane in zip(_MUL1, lanes, strict=True)]

    def update(self, lanes: tuple[int, ...]) -> None:
        v0, v1, mul0, mul1 = self.v0, self.v1, self.mul0, self.mul1
        for i in range(4):
            v1[i] = (v1[i] + mul0[i] + lanes[i]) & MASK
            mul0[i] ^= (v1[i] & 0xFFFFFFFF) * (v0[i] >> 32)
            v0[i] = (v0[i] + mul1[i]) & MASK
            mul1[i] ^= (v0[i] & 0xFFFFFFFF) * (v1[i] >> 32)
        for into, of in ((v0, v1), (v1, v0)):
            for low in (0, 2):
                into[low], into[low + 1] = _merged(of[low + 1], of[low], into[low + 1], into[low])

    def packet(self, data: bytes) -> None:
        self.update(struct.unpack("<4Q", data))

    def rest(self, data: bytes) -> None:
        size = len(data)
        self.v0 = [(lane + (size << 32) + size) & MASK for lane in self.v0]
        self.v1 = [_rotated(lane, size) for lane in self.v1]
        packet = bytearray(32)
        whole, over = size & ~3, size & 3
        packet[:whole] = data[:whole]
        if size & 16:
            packet[28:32] = data[whole + over - 4 : whole + over]
        elif over:
            packet[16:19] = bytes((data[whole], data[whole + (over >> 1)], data[whole + over - 1]))
        self.packet(bytes(packet))


def _merged(v1: int, v0: int, add1: int, add0: int) -> tuple[int, int]:
    add0 += (
        (((v0 & 0xFF000000) | (v1 & 0xFF00000000)) >> 24)
        | (((v0 & 0xFF0000000000) | (v1 & 0xFF000000000000)) >> 16)
        | (v0 & 0xFF0000)
        | ((v0 & 0xFF00) << 32)
        | ((v1 & 0xFF00000000000000) >> 8)
        | ((v0 << 56) & MASK)
    )
    add1 += (
        (((v1 & 0xFF000000) | (v0 & 0xFF00000000)) >> 24)
        | (v1 & 0xFF0000)
        | ((v1 & 0xFF0000000000) >> 16)
        | ((v1 & 0xFF00) << 24)
        | ((v0 & 0xFF000000000000) >> 8)
        | ((v1 & 0xFF) << 48)
        | (v0 & 0xFF00000000000000)
    )
    return add0 & MASK, add1 & MASK


def _rotated(lane: int, count: int) -> int:
    def half(word: int) -> int:
        return ((word << count) | (word >> (32 - count))) & 0xFFFFFFFF

    return half(lane & 0xFFFFFFFF) | (half(lane >> 32) << 32)


def highway_64(key: bytes, data: bytes) -> bytes:
    """The hash in little endian. `key` has 32 bytes."""
    state = _State(key)
    whole = len(data) & ~31
    for at in range(0, whole, 32):
        state.packet(data[at : at + 32])
    if len(data) > whole:
        state.rest(data[whole:])
    for _ in range(4):
        v0 = state.v0
        state.update((_turned(v0[2]), _turned(v0[3]), _turned(v0[0]), _turned(v0[1])))
    return struct.pack("<Q", (state.v0[0] + state.v1[0] + state.mul0[0] + state.mul1[0]) & MASK)
