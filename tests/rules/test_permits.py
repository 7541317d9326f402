"""Permits: any daemon with the secret can read one, and nobody can make or change one without it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric.errors import UnknownPermit
from ifabric_actors.governor import permits as module
from ifabric_actors.governor.permits import CLOSED, PROBE, Permit, Permits

SECRET = b"s" * 44


def given_out(kind: str = CLOSED, generation: int = 12) -> tuple[Permits, str, str]:
    daemon = Permits(SECRET, "one_")
    nonce = daemon.nonce()
    return daemon, nonce, daemon.write("openai/gpt-x", "s1", kind, generation, nonce)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [CLOSED, PROBE])
def test_another_daemon_reads_what_one_wrote(kind: str) -> None:
    _, nonce, text = given_out(kind)
    assert Permits(SECRET, "other").read("openai/gpt-x", "s1", text) == Permit(kind, 12, nonce)  # type: ignore[arg-type]


def test_a_permit_fits_in_a_report() -> None:
    daemon = Permits(SECRET, "12345678901")
    assert len(daemon.write("b", "s", PROBE, 2**53, f"{daemon.nonce()}{2**64:x}")) <= 128


@pytest.mark.parametrize(
    ("breaker", "session", "secret"),
    [("openai/gpt-y", "s1", SECRET), ("openai/gpt-x", "s2", SECRET), ("openai/gpt-x", "s1", b"t" * 44)],
)
def test_a_permit_is_of_use_for_one_breaker_and_one_session_under_one_secret(
    breaker: str, session: str, secret: bytes
) -> None:
    _, _, text = given_out()
    with pytest.raises(UnknownPermit):
        Permits(secret, "other").read(breaker, session, text)


def test_not_one_character_of_it_can_be_changed() -> None:
    daemon, _, text = given_out()
    for at in range(len(text)):
        for other in "0p.é ":
            changed = text[:at] + other + text[at + 1 :]
            if changed != text:
                with pytest.raises(UnknownPermit):
                    daemon.read("openai/gpt-x", "s1", changed)


@given(st.text(max_size=128) | st.from_regex(r"[cp][0-9]{0,5}\.[a-z0-9]{0,9}\.[0-9a-f]{24}", fullmatch=True))
def test_whatever_else_is_sent_is_an_unknown_permit(text: str) -> None:
    with pytest.raises(UnknownPermit):
        Permits(SECRET, "one").read("b", "s", text)


def test_one_that_was_reported_is_known_as_such_until_many_others_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEEN_MAX", 3)
    daemon = Permits(SECRET, "one")
    permits = [Permit(CLOSED, 1, daemon.nonce()) for _ in range(5)]
    assert [daemon.use(permit) for permit in permits[:3]] == [True] * 3
    assert not daemon.use(permits[0])
    daemon.unuse(permits[0])
    assert daemon.use(permits[0])
    assert all(daemon.use(permit) for permit in permits[3:])
    assert len(daemon._seen) == 3
