"""Who is let in, as whom, and how that changes: the decisions alone, and the tokens that carry them."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import msgspec
import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric import credentials
from ifabric.bus.serverconf import Identities, ServerConf
from ifabric.errors import BadRequest, ConfigError, Conflict, Forbidden
from ifabric.wire import callout, protocol, subjects
from ifabric.wire import identity as wire
from ifabric.wire.envelope import Mutation
from ifabric.wire.permissions import ROLES, SYSTEM, daemon, inbox_prefix, permissions
from ifabric_actors.identity import rules
from ifabric_actors.identity.records import Agent

COMPONENTS = ("coordinator", "governor", "chassis")
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
NOW = 1_800_000_000_000
A, B, C = (credentials.make().public_key for _ in range(3))


def agent(**fields: Any) -> Agent:
    return Agent(**{"role": "agent", "public_key": A, **fields})


# -- NATS's own matching, for the tables below -----------------------------------------------------------------------


def matches(pattern: str, subject: str) -> bool:
    """As NATS matches a subject, or as it decides whether a pattern is within another."""
    mine, its = pattern.split("."), subject.split(".")
    for at, word in enumerate(mine):
        if word == ">":
            return len(its) > at
        if at >= len(its) or (word not in ("*", its[at])) or (word != ">" and its[at] == ">"):
            return False
    return len(mine) == len(its)


def may(patterns: tuple[str, ...], subject: str) -> bool:
    return any(matches(pattern, subject) for pattern in patterns)


@given(NAMES, NAMES)
def test_whatever_an_agent_is_called_it_reaches_nothing_that_is_not_its_own(name: str, other: str) -> None:
    allowed = permissions("agent", name, COMPONENTS)
    if name != other:
        assert not may(allowed.publish, subjects.request("coordinator", "claim", other))
        assert not may(allowed.subscribe, f"{inbox_prefix(other)}.x")
    for request in protocol.REQUESTS:
        assert not may(allowed.publish, subjects.request(request.component, request.verb, name, admin=True))
    for about in protocol.EVENTS:
        assert not may(allowed.publish, subjects.event(*about))
        assert not may(allowed.publish, f"if.v1.audit.{about[0]}.{about[1]}")
        assert not may(allowed.publish, subjects.event("task", name)), "a name that is also an event's"
    for wide in (">", "if.>", "if.v1.*.*.*", f"if.v1.*.*.{name}", "_INBOX.>", "_INBOX.*.>", "if.v1.event.>"):
        assert not may(allowed.subscribe, wide)


@pytest.mark.parametrize("role", [role for role in ROLES if role != "agent"])
def test_only_an_operator_reaches_the_admin_verbs_and_only_as_itself(role: Any) -> None:
    allowed = permissions(role, "ann", COMPONENTS)
    reached = may(allowed.publish, subjects.request("coordinator", "purge", "ann", admin=True))
    assert reached == (role == "operator")
    assert not may(allowed.publish, subjects.request("coordinator", "purge", "bob", admin=True))
    for destructive in (
        "STREAM.DELETE.IF_EVENTS",
        "STREAM.PURGE.IF_EVENTS",
        "STREAM.UPDATE.IF_EVENTS",
        "ACCOUNT.PURGE.X",
    ):
        assert not may(allowed.publish, f"$JS.API.{destructive}")


def test_an_auditor_reads_the_audit_and_no_other_role_but_a_backup_does() -> None:
    for role in ROLES:
        allowed = permissions(role, "ann", COMPONENTS)
        read = may(allowed.publish, "$JS.API.CONSUMER.CREATE.IF_AUDIT.x") and may(allowed.subscribe, subjects.AUDIT)
        assert read is (role == "auditor"), role
        assert may(allowed.publish, "$JS.API.STREAM.SNAPSHOT.IF_AUDIT") is (role == "backup"), role
        assert not may(allowed.publish, subjects.audit("coordinator", "claim")), role
    auditor = permissions("auditor", "ann", COMPONENTS)
    for request in protocol.REQUESTS:
        subject = subjects.request(request.component, request.verb, "ann", admin=request.admin)
        assert may(auditor.publish, subject) is (request.verb == "whoami"), subject


def test_the_daemon_cannot_be_made_to_say_a_command() -> None:
    allowed = daemon()
    for request in protocol.REQUESTS:
        for_sessions = request.component == "governor" and request.verb in ("balance", "commit", "admit", "report")
        subject = subjects.request(request.component, request.verb, "alice", admin=request.admin)
        assert may(allowed.publish, subject) is for_sessions
        assert may(allowed.subscribe, subjects.endpoint(request.component, request.verb, admin=request.admin))
    assert may(allowed.publish, "_INBOX.alice.xyz.1")
    assert not may(allowed.publish, "_INBOX.alice")
    assert may(allowed.subscribe, subjects.EVERY_EVENT)
    assert not may(SYSTEM.publish, "$SYS.REQ.CLAIMS.UPDATE")


def test_the_live_page_looks_under_a_name_of_its_own_and_acts_for_its_operators_alone() -> None:
    plain, allowed = daemon(), daemon(["ann"])
    acting = set()
    for request in protocol.REQUESTS:
        looks = not issubclass(request, Mutation) and request.verb not in ("renew", "admit", "report", "replay")
        subject = subjects.request(request.component, request.verb, subjects.PAGE_SESSION, admin=request.admin)
        if may(plain.publish, subject):
            assert looks or may(plain.publish, subject.replace("_page", "alice")), f"{subject} changes something"
        if may(allowed.publish, subjects.request(request.component, request.verb, "ann", admin=request.admin)):
            acting.add((request.component, request.verb, request.admin))
    assert {one for one in acting if one[2]} == {
        ("coordinator", "cancel", True),
        ("coordinator", "requeue", True),
        ("governor", "account", True),
        ("governor", "breaker", True),
        ("chassis", "kill", True),
    }
    assert not may(allowed.publish, subjects.request("coordinator", "cancel", "bob", admin=True))
    assert not may(allowed.publish, subjects.request("coordinator", "purge", "ann", admin=True))
    for question in (("coordinator", "list", False), ("coordinator", "sessions", True), ("governor", "accounts", True)):
        component, verb, admin = question
        assert may(plain.publish, subjects.request(component, verb, subjects.PAGE_SESSION, admin=admin))


@pytest.mark.parametrize("role", list(ROLES))
def test_nobody_else_speaks_or_listens_as_the_live_page(role: Any) -> None:
    allowed = permissions(role, "ann", COMPONENTS)
    for request in protocol.REQUESTS:
        subject = subjects.request(request.component, request.verb, subjects.PAGE_SESSION, admin=request.admin)
        assert not may(allowed.publish, subject)
        assert not may(allowed.subscribe, subject)
    assert not may(allowed.subscribe, f"{subjects.DAEMON_INBOX}.x.y")
    assert not may(allowed.subscribe, "_INBOX._page.x")


def test_an_observer_may_ask_what_changes_nothing() -> None:
    allowed = permissions("observer", "ann", COMPONENTS)
    for component, verb in (("coordinator", "sessions"), ("governor", "accounts")):
        assert may(allowed.publish, subjects.request(component, verb, "ann", admin=True))
        assert not may(allowed.publish, subjects.request(component, verb, "bob", admin=True))
    assert may(allowed.publish, subjects.request("chassis", "runs", "ann"))


def test_a_name_of_the_fabric_itself_is_nobody_s() -> None:
    page = subjects.PAGE_SESSION
    with pytest.raises(Forbidden, match="fabric itself"):
        rules.created(wire.CreateAgent(agent=page, public_key=A), None, "ann", NOW)
    assert rules.badge(page, agent(), A, NOW) is None
    assert rules.operator_of(A, {page: A}) is None


@pytest.mark.parametrize(
    ("reply", "own"),
    [
        ("_INBOX.alice.x", True),
        ("_INBOX.alice.x.1", True),
        ("_INBOX.alice", False),
        ("_INBOX.alicex.1", False),
        ("_INBOX.bob.x", False),
        ("_INBOX.x", False),
        ("_IFABRIC.x.y", True),
        ("_IFABRICX.y", False),
        ("if.v1.event.task.alice", False),
    ],
)
def test_an_answer_goes_to_the_session_s_own_inbox(reply: str, own: bool) -> None:
    assert subjects.is_own_inbox(reply, "if.v1.coordinator.claim.alice") is own


# -- records ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "key", "let_in"),
    [
        (None, A, False),
        (agent(), A, True),
        (agent(), B, False),
        (agent(revoked_at=1), A, False),
        (agent(former_key=B, former_until=NOW + 1), B, True),
        (agent(former_key=B, former_until=NOW), B, False),
        (agent(former_key=B, former_until=NOW + 1, revoked_at=1), B, False),
        (agent(former_key="", former_until=NOW + 1), "", False),
    ],
)
def test_a_key_is_let_in_while_it_is_its_agent_s(there: Agent | None, key: str, let_in: bool) -> None:
    assert (rules.badge("alice", there, key, NOW) is not None) is let_in
    user = rules.Badge("alice", "agent", key).user
    assert (user in rules.users_of("alice", there, {}, NOW)) is (let_in and bool(key))


def test_a_connection_is_known_by_its_name_and_its_key() -> None:
    user = rules.Badge("alice", "agent", A).user
    assert rules.name_of(user) == "alice"
    assert rules.name_of(A) is None, "a daemon's"
    assert rules.users_of("ann", agent(public_key=B), {"ann": A}, NOW) == {rules.Badge("ann", "operator", A).user}


def test_a_name_is_one_agent_s_for_ever() -> None:
    create = wire.CreateAgent(agent="alice", public_key=A)
    made = rules.created(create, None, "ann", NOW)
    assert rules.created(create, made, "bea", NOW + 5) == made, "the same again changes nothing"
    with pytest.raises(Conflict, match="another key"):
        rules.created(wire.CreateAgent(agent="alice", public_key=B), made, "ann", NOW)
    gone = rules.revoked(wire.RevokeAgent(agent="alice", why="stolen"), made, "ann", NOW)
    assert (gone.revoked_at, gone.note) == (NOW, "stolen")
    with pytest.raises(Conflict, match="was revoked"):
        rules.created(create, gone, "ann", NOW)
    back = rules.rotated(wire.RotateAgent(agent="alice", public_key=B, grace_s=60), gone, "ann", NOW)
    assert (back.public_key, back.former_key, back.revoked_at) == (B, "", 0), "the stolen key has no grace"
    turned = rules.rotated(wire.RotateAgent(agent="alice", public_key=C, grace_s=60), back, "ann", NOW)
    assert (turned.former_key, turned.former_until) == (B, NOW + 60_000)


@pytest.mark.parametrize(
    ("own", "asked", "gets"),
    [
        ("acme/research", None, "acme/research"),
        ("acme/research", "acme/research", "acme/research"),
        ("acme/research", "acme/research/team", "acme/research/team"),
        ("acme/research", "acme", None),
        ("acme/research", "acme/researchers", None),
        ("acme/research", "other/acme/research", None),
        (None, None, ""),
        (None, "acme", None),
    ],
)
def test_money_comes_from_the_agent_s_own_account_or_from_below_it(
    own: str | None, asked: str | None, gets: str | None
) -> None:
    if gets is None:
        with pytest.raises(Forbidden):
            rules.account_for("alice", asked, agent(account=own))
    else:
        assert (rules.account_for("alice", asked, agent(account=own)) or "") == gets
    assert rules.account_for("ann", asked, agent(role="operator")) == asked
    assert rules.account_for("ann", asked, None) == asked, "an operator of the configuration"


# -- tokens ----------------------------------------------------------------------------------------------------------


def token(nkey: str = "", sig: str = "", nonce: str = "n0nce", **more: Any) -> bytes:
    body = {
        "nats": {
            "server_id": {"id": "NSERVER"},
            "user_nkey": "UTEMP",
            "client_info": {"host": "127.0.0.1", "nonce": nonce},
            "connect_opts": {"nkey": nkey, "sig": sig},
            "type": "authorization_request",
            **more,
        }
    }
    return b"e30." + base64.urlsafe_b64encode(json.dumps(body).encode()).rstrip(b"=") + b".c2ln"


def signed(one: credentials.Credential, nonce: str, *, padded: bool = True, url: bool = False) -> str:
    raw = nkeys.from_seed(bytearray(one.seed.encode())).sign(nonce.encode())
    text = (base64.urlsafe_b64encode if url else base64.b64encode)(raw).decode()
    return text if padded else text.rstrip("=")


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("url", [True, False])
def test_a_proof_is_taken_in_every_client_s_base64(padded: bool, url: bool) -> None:
    for _ in range(20):
        one = credentials.make()
        assert callout.is_proven(callout.read(token(one.public_key, signed(one, "n0nce", padded=padded, url=url))))


def test_no_other_proof_is_taken() -> None:
    alice, eve = credentials.make(), credentials.make()
    account = credentials.make(kind="account")
    good = signed(alice, "n0nce")
    for nkey, sig, nonce in (
        (alice.public_key, good, "another"),
        (alice.public_key, signed(eve, "n0nce"), "n0nce"),
        (eve.public_key, good, "n0nce"),
        (alice.public_key, "", "n0nce"),
        (alice.public_key, "%%%", "n0nce"),
        (alice.public_key, good[:-8], "n0nce"),
        (alice.public_key[:-1] + ("A" if alice.public_key[-1] != "A" else "B"), good, "n0nce"),
        (alice.public_key.lower(), good, "n0nce"),
        (alice.public_key[:20], good, "n0nce"),
        (account.public_key, signed(account, "n0nce"), "n0nce"),
        ("ü" * 56, good, "n0nce"),
        (alice.public_key, signed(alice, ""), ""),
    ):
        assert not callout.is_proven(callout.read(token(nkey, sig, nonce))), (nkey, sig, nonce)


@given(st.binary(max_size=200))
def test_junk_is_no_question(data: bytes) -> None:
    with pytest.raises(BadRequest):
        callout.read(data)


def test_a_token_of_another_kind_is_no_question() -> None:
    for wrong in (token(type="user"), token(server_id=3), b".." + b"x" * 300_000, b"a.b.c", b"e30.e30.e30"):
        with pytest.raises(BadRequest):
            callout.read(wrong)


def test_an_answer_is_signed_by_the_issuer_and_is_about_the_key_that_the_server_made() -> None:
    issuer = credentials.make(kind="account")
    asked = callout.read(token("UKEY"))
    data = callout.granted(
        asked,
        name="alice@UKEY",
        may=permissions("agent", "alice", COMPONENTS),
        account="FABRIC",
        issuer=issuer.seed,
        now_s=7,
    )

    def claims(jwt: bytes) -> Any:
        head, body, signature = jwt.split(b".")
        nkeys.from_seed(bytearray(issuer.seed.encode())).verify(
            head + b"." + body, base64.urlsafe_b64decode(signature + b"==")
        )
        return msgspec.json.decode(base64.urlsafe_b64decode(body + b"==="))

    answer = claims(data)
    assert (answer["sub"], answer["aud"], answer["iss"]) == ("UTEMP", "NSERVER", issuer.public_key)
    user = claims(answer["nats"]["jwt"].encode())
    assert (user["sub"], user["aud"], user["name"]) == ("UTEMP", "FABRIC", "alice@UKEY")
    assert user["nats"]["pub"]["allow"] == list(permissions("agent", "alice", COMPONENTS).publish)
    assert "deny" not in json.dumps(user), "allow-lists, and nothing else"
    assert "resp" not in user["nats"], "no allow_responses"
    refusal = claims(callout.refused(asked, "unknown", issuer=issuer.seed, now_s=7))
    assert refusal["nats"]["error"] == "unknown"


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_credential_is_written_once_for_its_owner_and_read_again(tmp_path: Any) -> None:
    made = credentials.make("alice")
    path = tmp_path / "deep" / "alice.nk"
    made.write(path, "Whoever has this file is alice.")
    assert path.stat().st_mode & 0o777 == 0o600
    assert credentials.read(path) == made
    assert made.seed not in repr(made)
    with pytest.raises(ConfigError, match="is there already"):
        made.write(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "0 lines"),
        ("# session: alice\n", "0 lines"),
        ("SUAAAA\n", "0 lines"),
        (f"{credentials.make().seed}\n{credentials.make().seed}\n", "2 lines"),
        (f"# session: a.b\n{credentials.make().seed}\n", "session"),
        ("SU" + "A" * 56 + "\n", "checksum"),
    ],
)
def test_what_is_no_credential_is_named(tmp_path: Any, text: str, why: str) -> None:
    path = tmp_path / "x.nk"
    path.write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        credentials.read(path)
    assert str(path) in caught.value.message
    assert "SU" + "A" * 56 not in caught.value.message


def test_the_servers_configuration_has_no_deny_rule_and_no_allow_responses() -> None:
    keys = Identities(issuer="A", daemon="UD", system="US")
    text = ServerConf(name="n", listen="127.0.0.1:1", store_dir="/x", identities=keys).text()
    assert "deny" not in text
    assert "allow_responses" not in text
    assert re.search(r"auth_callout \{ issuer: A, account: SYS, auth_users: \[ UD, US \] \}", text)
    assert "no_auth_user" not in text
