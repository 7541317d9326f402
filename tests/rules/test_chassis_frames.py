"""What daemon and workers say to each other."""

from __future__ import annotations

import os
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric_actors.chassis import frames

SAID = (
    frames.Http(1, b"{}"),
    frames.Refused("no"),
    frames.Compiled(b"\x00" * 70_000),
    frames.Done(2, "exit", "", "", 3, b"out", b"err", True, 0.5, 0.25, 7, 65536, 3, ""),
)


@given(st.lists(st.integers(1, 5000), max_size=40))
def test_frames_arrive_whole_however_they_were_cut(cuts: list[int]) -> None:
    data = frames.pack(*SAID)
    reader, heard = frames.Reader(frames.FromWorker), []
    while data:
        cut = cuts.pop() if cuts else len(data)
        reader.feed(data[:cut])
        data = data[cut:]
        while (frame := reader.take()) is not None:
            heard.append(frame)
    assert tuple(heard) == SAID
    assert reader.take() is None


@pytest.mark.parametrize(
    "junk", [b"\xff\xff\xff\xff", b"\x05\x00\x00\x00hello", frames.pack(frames.Fork(1)), b"\x00\x00\x00\x00"]
)
def test_what_is_no_frame_of_a_worker_is_refused(junk: bytes) -> None:
    reader = frames.Reader(frames.FromWorker)
    reader.feed(junk)
    with pytest.raises((ValueError, msgspec.DecodeError)):
        reader.take()


def test_a_descriptor_travels_with_its_frame_and_is_not_inherited() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        memory = os.memfd_create("t")
        os.write(memory, b"compiled")
        ours.sendmsg([frames.pack(frames.Load(7))], frames.rights((memory,)))
        os.close(memory)
        data, (fd,) = frames.receive(theirs)
        assert os.pread(fd, 100, 0) == b"compiled"
        assert not os.get_inheritable(fd)
        os.close(fd)
        reader = frames.Reader(frames.ToWorker)
        reader.feed(data)
        assert reader.take() == frames.Load(7)
