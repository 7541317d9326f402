"""Secrets: read from Vault by the real hvac, kept while they are good, ended at stop, and never told.

Vault is a stub (`vault_stub`), and also a real server when IFABRIC_VAULT_ADDR and IFABRIC_VAULT_TOKEN (of one with root's
rights, KV v2 mounted at `secret`) are set. Tests that take `vault_at` run against both. Those that take `stub` cannot:
they freeze or seal the server, move its clock, count its requests, or need a dynamic secret, for which a real Vault
wants a database.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import html
import io
import json
import logging
import os
import pickle
import re
import socket
import ssl
import subprocess
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import httpx
import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.traceback import Traceback

from ifabric.config_chassis import Credential, Credentials
from ifabric.errors import Unavailable
from ifabric.log import _json
from ifabric.metrics import Metrics
from ifabric.testing.clock import VirtualClock
from ifabric_actors.chassis.secrets import Secret, Vault
from ifabric_actors.chassis.tokens import AppRole
from ifabric_actors.chassis.vault import ANSWER_MAX_BYTES, WORKERS, Hidden, _Job
from tests.actors.vault_stub import VaultStub

REAL = os.environ.get("IFABRIC_VAULT_ADDR"), os.environ.get("IFABRIC_VAULT_TOKEN")
OPENAI = Credential(vault_path="secret/data/openai", field="api_key")
READER = Credential(vault_path="database/creds/reader", field="password", header="X-Key", format="{}")


async def eventually(true: Callable[[], Any], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not true():
            await asyncio.sleep(0.002)


# -- what is told, and what must not be -------------------------------------------------------------------------------


class Told:
    """Everything that anybody was told, and the secrets that are not to be in it."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.canaries: set[str] = set()

    def error(self, error: BaseException) -> None:
        """Every way in which an exception is shown, with the variables of its frames."""
        shown = Console(width=500, file=io.StringIO())
        how = {"show_locals": True, "locals_max_string": None, "locals_max_length": None, "locals_hide_dunder": False}
        shown.print(Traceback.from_exception(type(error), error, error.__traceback__, **how))
        self.texts += [shown.file.getvalue(), repr(error), str(error), repr(vars(error))]
        self.texts += traceback.format_exception(error, chain=True)
        assert error.__cause__ is None and error.__context__ is None

    def check(self) -> None:
        for text in self.texts:
            for canary in self.canaries:
                assert canary not in text, f"told: {canary} in {text}"


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
    caplog.set_level(logging.DEBUG)
    for name in ("", "urllib3", "requests", "hvac", "asyncio", "urllib3.connectionpool"):
        caplog.set_level(logging.DEBUG, logger=name)
    made = Told()
    made.canaries.add("canary")
    yield made
    made.texts += [f"{record.getMessage()} {record.args!r} {record.__dict__!r}" for record in caplog.records]
    made.check()


def logger(told: Told) -> Any:
    class Sink:
        def msg(self, text: str) -> None:
            told.texts.append(text)

        debug = info = warning = error = msg

    def both(_: Any, __: str, event: Any) -> str:
        return f"{_json(dict(event))} {event!r} {structlog.dev.ConsoleRenderer()(_, __, dict(event))}"

    return structlog.wrap_logger(
        Sink(), processors=[structlog.processors.add_log_level, both], wrapper_class=structlog.BoundLogger
    )


# -- a Vault, and one who asks it ---------------------------------------------------------------------------------------


class Server:
    """A Vault as an administrator sees it: the same requests for the stub and for a real one."""

    def __init__(self, url: str, root: str, told: Told) -> None:
        self.url, self._root, self._told = url, root, told
        self._http = httpx.Client(trust_env=False, verify=url.startswith("https"))

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"X-Vault-Token": self._root, "X-Vault-Request": "true"}
        answer = self._http.request(method, f"{self.url}/v1/{path}", json=body, headers=headers)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def write(self, path: str, **fields: Any) -> None:
        self._told.canaries |= {value for value in fields.values() if isinstance(value, str) and len(value) > 8}
        self.ask("POST", path, {"data": fields})

    def token(self) -> str:
        made: str = self.ask("POST", "auth/token/create", {"ttl": "3600s"})["auth"]["client_token"]
        self._told.canaries.add(made)
        return made

    def revoke(self, token: str) -> None:
        self.ask("POST", "auth/token/revoke", {"token": token})

    def role(self, name: str = "chassis", ttl_s: int = 60, max_s: int = 600, kind: str = "service") -> str:
        """Its role-id."""
        with contextlib.suppress(AssertionError):  # it was enabled before
            self.ask("POST", "sys/auth/approle", {"type": "approle"})
        rules = 'path "secret/*" { capabilities = ["read"] }'
        self.ask("POST", "sys/policies/acl/chassis-test", {"policy": rules})
        body = {"token_ttl": f"{ttl_s}s", "token_max_ttl": f"{max_s}s", "token_type": kind}
        self.ask("POST", f"auth/approle/role/{name}", {**body, "token_policies": "chassis-test"})
        role_id: str = self.ask("GET", f"auth/approle/role/{name}/role-id")["data"]["role_id"]
        self._told.canaries.add(role_id)
        return role_id

    def secret_id(self, name: str = "chassis", uses: int = 0) -> str:
        made: str = self.ask("POST", f"auth/approle/role/{name}/secret-id", {"num_uses": uses})["data"]["secret_id"]
        self._told.canaries.add(made)
        return made

    def close(self) -> None:
        self._http.close()


class Desk:
    """Vaults over one server, with files for their tokens."""

    def __init__(self, server: Server, clock: VirtualClock, told: Told, directory: Path) -> None:
        self.server, self.clock, self.told = server, clock, told
        self.token_file, self.role_file, self.secret_file = (
            directory / name for name in ("vault-token", "role-id", "secret-id")
        )
        self.metrics = Metrics()
        self._vaults: list[Vault] = []
        self._keeping: list[asyncio.Task[None]] = []

    def vault(self, **config: Any) -> Vault:
        """One with the token in the file."""
        if not self.token_file.exists():
            self.token_file.write_text(self.server.token() + "\n")
        return self._made(vault_token_path=str(self.token_file), **config)

    def approle(self, *, uses: int = 0, **role: Any) -> Vault:
        """One with an AppRole."""
        self.role_file.write_text(self.server.role(**role) + "\n")
        self.secret_file.write_text(self.server.secret_id(uses=uses) + "\n")
        return self._made(vault_role_id_path=str(self.role_file), vault_secret_id_path=str(self.secret_file))

    def _made(self, **config: Any) -> Vault:
        config = {"vault_addr": self.server.url, "timeout_seconds": 2.0, **config}
        made = Vault(Credentials(**config), self.clock, self.metrics, logger(self.told))
        self._vaults.append(made)
        return made

    async def refusal(self, vault: Vault, credential: Credential = OPENAI) -> str:
        """The sentence of the refusal that it must get."""
        with pytest.raises(Unavailable) as caught:
            await vault.header(credential)
        self.told.error(caught.value)
        self.told.texts += [repr(task) for task in asyncio.all_tasks()]
        self.told.texts += [repr(vars(part)) for part in (vault, vault._lines, vault._login, vault._flights)]
        self.told.texts += [repr(dict(vault._entries))]
        assert caught.value.facts["what"] == "vault" and caught.value.retryable
        return caught.value.message

    def keep(self, vault: Vault) -> None:
        self._keeping.append(asyncio.create_task(vault.keep()))

    async def pass_time(self, seconds: float, step_s: float = 1.0) -> None:
        """So much time passes, and whoever keeps leases keeps up with it."""
        for _ in range(round(seconds / step_s)):
            await eventually(lambda: self.clock.sleepers == len(self._keeping))
            await self.clock.advance(step_s)
        await eventually(lambda: self.clock.sleepers == len(self._keeping))

    def count(self, name: str = "if_chassis_vault_requests_total", **labels: str) -> float:
        return self.metrics.counter(name, **labels).value

    @property
    def asked(self) -> float:
        return self.count(outcome="done") + self.count(outcome="failed")

    @property
    def leases(self) -> float:
        return self.metrics.gauge("if_chassis_vault_leases").value

    async def close(self) -> None:
        for task in self._keeping:
            assert not task.done(), task
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        for vault in self._vaults:
            await vault.stop()
        await eventually(lambda: not vault_threads())
        self.server.close()


def vault_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("vault")]


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def stub(clock: VirtualClock, told: Told) -> Iterator[VaultStub]:
    made = VaultStub(clock.monotonic)
    yield made
    made.close()
    told.canaries |= set(made.tokens) - {made.root}
    told.canaries |= {name for name in made.revoked if name.startswith("hv")}


@pytest.fixture
async def desk(stub: VaultStub, clock: VirtualClock, told: Told, tmp_path: Path) -> AsyncIterator[Desk]:
    made = Desk(Server(stub.url, stub.root, told), clock, told, tmp_path)
    made.server.write("secret/data/openai", api_key="sk-canary-openai-1", other="sk-canary-other")
    yield made
    stub.thaw()
    await made.close()


@pytest.fixture(params=["stub", *(["real"] if all(REAL) else [])])
async def vault_at(
    request: pytest.FixtureRequest, clock: VirtualClock, told: Told, tmp_path: Path
) -> AsyncIterator[Desk]:
    """The stub, and the real one if there is one."""
    stub = VaultStub(clock.monotonic) if request.param == "stub" else None
    url, root = (stub.url, stub.root) if stub is not None else REAL
    made = Desk(Server(str(url), str(root), told), clock, told, tmp_path)
    made.server.write("secret/data/openai", api_key="sk-canary-openai-1", other="sk-canary-other")
    yield made
    await made.close()
    if stub is not None:
        stub.close()


# -- a secret -----------------------------------------------------------------------------------------------------------


def a_secret(value: str = "sk-canary-openai-1", format: str = "Bearer {}") -> Secret:
    return Secret("secret/data/openai#api_key", value, format)


def test_a_secret_shows_its_name_and_nothing_else(told: Told) -> None:
    secret = a_secret()
    name = "Secret(secret/data/openai#api_key)"
    assert {repr(secret), str(secret), f"{secret}", f"{secret!r:>5}", f"{secret:>90}", "%s" % secret} == {name}  # noqa: UP031
    assert repr([secret]) == f"[{name}]" and msgspec.json.encode({"a": secret}, enc_hook=str) == b'{"a":"%s"}' % (
        name.encode()
    )
    assert not hasattr(secret, "__dict__")
    told.texts += [
        repr(secret),
        repr([secret]),
        repr(Hidden("sk-canary")),
        str(Hidden("sk-canary")),
        f"{Hidden('canary')}",
    ]


@pytest.mark.parametrize("held", [a_secret(), Hidden("sk-canary")])
@pytest.mark.parametrize(
    "take",
    [
        pickle.dumps, lambda secret: pickle.dumps(secret, 0), copy.copy, copy.deepcopy, msgspec.json.encode, msgspec.msgpack.encode, msgspec.to_builtins,
        json.dumps, vars, dict, lambda secret: secret.__getstate__(), lambda secret: secret.__reduce_ex__(2),
    ],
)  # fmt: skip
def test_a_secret_is_neither_copied_nor_encoded(take: Callable[[Any], Any], held: Any) -> None:
    with pytest.raises(TypeError):
        take(held)


def test_a_secret_is_revealed_as_the_header_wants_it() -> None:
    assert a_secret().reveal() == "Bearer sk-canary-openai-1"
    assert a_secret(format="{}").reveal() == "sk-canary-openai-1"
    assert a_secret("a{}b").reveal() == "Bearer a{}b"


VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=12, max_size=80).filter(
    lambda value: value == value.strip()
)


def scrubbed(data: bytes, secret: Secret) -> bytes:
    for form in secret.forms():
        data = data.replace(form, b"*")
    return data


@given(VALUES, st.sampled_from(["Bearer {}", "{}", "token={}; v=1"]), st.binary(max_size=20), st.binary(max_size=20))
def test_no_way_of_repeating_a_secret_gets_past_its_forms(value: str, format: str, before: bytes, after: bytes) -> None:
    secret = a_secret(value, format)
    for text in (value, secret.reveal()):
        escaped = json.dumps(text)[1:-1]
        in_go = escaped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        lower = re.sub("%..", lambda found: found[0].lower(), quote(text, safe=""))
        for said in (
            text.encode(), escaped.encode(), escaped.replace("/", "\\/").encode(), in_go.encode(),
            quote(text).encode(), quote(text, safe="").encode(), quote_plus(text).encode(), lower.encode(),
            html.escape(text).encode(), base64.b64encode(text.encode()), base64.b64encode(text.encode()).rstrip(b"="),
            base64.urlsafe_b64encode(text.encode()), base64.urlsafe_b64encode(text.encode()).rstrip(b"="),
        ):  # fmt: skip
            assert said not in scrubbed(before + said + after, secret)
            assert scrubbed(said, secret) == b"*", "none of it is left"
    for coded in (base64.b64encode, base64.urlsafe_b64encode):
        left = scrubbed(coded(before + value.encode() + after), secret)
        assert b"*" in left
        # at most the letters at the edges, which are half of other bytes
        whole = coded(before + value.encode() + after)
        assert len(whole) - len(left) + 1 >= (len(value) * 8 - 10) // 6


def test_the_longest_form_comes_first_and_a_short_secret_has_only_itself_in_short() -> None:
    forms = a_secret("abc").forms()
    assert list(forms) == sorted(forms, key=lambda form: -len(form))
    assert [form for form in forms if len(form) < 8] == [b"abc"]
    assert b"Bearer abc" in forms


def test_the_password_in_a_secret_for_basic_authentication_is_looked_for_too() -> None:
    value = base64.b64encode(b"user:correct-horse").decode()
    assert {b"user:correct-horse", b"correct-horse"} <= set(a_secret(value, "Basic {}").forms())


# -- KV -------------------------------------------------------------------------------------------------------------------


async def test_a_secret_is_read_and_put_into_its_header(vault_at: Desk) -> None:
    vault = vault_at.vault()
    await vault.start()
    assert vault_at.asked == 0
    secret = await vault.header(OPENAI)
    assert secret.reveal() == "Bearer sk-canary-openai-1"
    assert repr(secret) == "Secret(secret/data/openai#api_key)"
    assert vault_at.count(outcome="done") == 1 and vault_at.leases == 0


async def test_a_secret_without_a_lease_is_believed_for_cache_seconds(vault_at: Desk) -> None:
    vault = vault_at.vault(cache_seconds=60.0)
    first = await vault.header(OPENAI)
    vault_at.server.write("secret/data/openai", api_key="sk-canary-openai-2")
    await vault_at.clock.advance(59.9)
    assert await vault.header(OPENAI) is first
    await vault_at.clock.advance(0.2)
    assert (await vault.header(OPENAI)).reveal() == "Bearer sk-canary-openai-2"
    assert vault_at.asked == 2


async def test_fields_of_one_path_are_read_together(vault_at: Desk) -> None:
    vault = vault_at.vault()
    one = await vault.header(OPENAI)
    other = await vault.header(Credential(vault_path="/secret/data/openai/", field="other"))
    plain = await vault.header(Credential(vault_path="secret/data/openai", field="other", format="key {}"))
    assert [secret.reveal() for secret in (one, other, plain)] == [
        "Bearer sk-canary-openai-1",
        "Bearer sk-canary-other",
        "key sk-canary-other",
    ]
    assert vault_at.asked == 1


async def test_a_secret_of_kv_v1_is_read_too(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    stub.instead = (200, {"lease_id": "", "data": {"metadata": "canary-meta", "value": "canary-of-kv1"}}, {})
    secret = await vault.header(Credential(vault_path="kv/openai"))
    assert secret.reveal() == "Bearer canary-of-kv1"


async def test_a_path_that_is_not_there_is_named(vault_at: Desk) -> None:
    vault = vault_at.vault()
    why = await vault_at.refusal(vault, Credential(vault_path="secret/data/absent"))
    assert why == "secret/data/absent is not in Vault: it was never written, or it was deleted."
    vault_at.server.ask("DELETE", "secret/data/openai")
    assert "secret/data/openai is not in Vault" in await vault_at.refusal(vault)
    assert vault.trouble is None  # Vault is fine


async def test_a_field_that_is_not_there_is_named_with_those_that_are(vault_at: Desk) -> None:
    why = await vault_at.refusal(vault_at.vault(), Credential(vault_path="secret/data/openai", field="key"))
    assert why == "secret/data/openai in Vault has no field key; there is api_key, other."


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("", "is empty"),
        (12, "is not text"),
        (None, "is not text"),
        ({"canary": "canary"}, "is not text"),
        ("sk-canary-line\n", "ends with a line break"),
        ("sk-canary\r\nX-Injected: 1", "holds something else than printable ASCII"),
        ("sk-canary-ünïcode", "holds something else than printable ASCII"),
        (" sk-canary-space", "begins or ends with a space"),
    ],
)
async def test_what_no_header_can_carry_is_refused(vault_at: Desk, value: Any, why: str) -> None:
    vault_at.server.write("secret/data/odd", value=value)
    said = await vault_at.refusal(vault_at.vault(), Credential(vault_path="secret/data/odd"))
    assert said.startswith("secret/data/odd#value in Vault ") and why in said


async def test_a_crowd_makes_one_request_and_who_leaves_it_takes_nothing_along(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    stub.freeze()
    crowd = [asyncio.create_task(vault.header(OPENAI)) for _ in range(50)]
    await eventually(lambda: stub.waiting == 1)
    for task in crowd[:25]:
        task.cancel()
    await asyncio.wait(crowd[:25])
    assert all(task.cancelled() for task in crowd[:25])
    stub.thaw()
    got = await asyncio.gather(*crowd[25:])
    assert len({id(secret) for secret in got}) == 1
    assert stub.asked("secret/data/openai", "GET") == 1


async def test_when_all_of_a_crowd_leave_the_secret_is_there_for_the_next(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    stub.freeze()
    alone = asyncio.create_task(vault.header(OPENAI))
    await eventually(lambda: stub.waiting == 1)
    alone.cancel()
    await asyncio.wait({alone})
    stub.thaw()
    await eventually(lambda: desk.asked == 1)
    await vault.header(OPENAI)
    assert desk.asked == 1


# -- the token in a file ------------------------------------------------------------------------------------------------


async def test_a_token_that_was_replaced_is_used_at_once(vault_at: Desk) -> None:
    vault = vault_at.vault(cache_seconds=1.0)
    await vault.header(OPENAI)
    old, new = vault_at.token_file.read_text().strip(), vault_at.server.token()
    state = vault_at.token_file.stat()
    if len(old) == len(new):  # in place, and `stat` shows nothing of it
        vault_at.token_file.write_text(new + "\n")
        os.utime(vault_at.token_file, ns=(state.st_atime_ns, state.st_mtime_ns))
    else:
        vault_at.token_file.write_text(new + "\n")
    vault_at.server.revoke(old)
    await vault_at.clock.advance(2.0)
    await vault.header(OPENAI)
    assert vault_at.count(outcome="failed") == 0


async def test_a_token_that_is_replaced_while_the_old_one_is_being_refused_is_tried(
    stub: VaultStub, desk: Desk
) -> None:
    vault = desk.vault()
    old, new = desk.token_file.read_text().strip(), desk.server.token()

    def replace(method: str, path: str) -> None:
        desk.token_file.write_text(new)
        stub._end(old)

    stub.before = replace
    assert (await vault.header(OPENAI)).reveal() == "Bearer sk-canary-openai-1"
    assert [status for _, path, status in stub.requests if path == "secret/data/openai"][-2:] == [403, 200]


async def test_a_token_that_vault_refuses_is_tried_once_and_its_file_is_named(vault_at: Desk) -> None:
    vault = vault_at.vault()
    vault_at.server.revoke(vault_at.token_file.read_text().strip())
    why = await vault_at.refusal(vault)
    assert "refuses the token for this: the token in" in why and str(vault_at.token_file) in why
    assert vault_at.asked == 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"hvs.canary hvs.canary", "holds something else"),
        (b"hvs.canary\nhvs.canary\n", "holds something else"),
        (b"hvs.canary\x00", "holds something else"),
        ("hvs.canary-ü".encode(), "holds something else"),
        ("directory", "cannot be read: Is a directory"),
        ("pipe", "is empty"),
    ],
)
async def test_a_token_file_that_is_of_no_use_is_named_and_not_shown(vault_at: Desk, content: Any, why: str) -> None:
    vault = vault_at.vault()
    vault_at.token_file.unlink()
    match content:
        case "directory":
            vault_at.token_file.mkdir()
        case "pipe":
            os.mkfifo(vault_at.token_file)
        case bytes():
            vault_at.token_file.write_bytes(content)
    said = await vault_at.refusal(vault)
    assert str(vault_at.token_file) in said and why in said
    assert vault_at.asked == 0


# -- AppRole --------------------------------------------------------------------------------------------------------------


async def test_an_approle_logs_in_when_it_is_needed_and_once(vault_at: Desk) -> None:
    vault = vault_at.approle()
    vault_at.server.write("secret/data/two", value="canary-number-two")
    await vault.start()
    assert vault_at.asked == 0
    await asyncio.gather(vault.header(OPENAI), vault.header(Credential(vault_path="secret/data/two")))
    assert vault_at.asked == 3


async def test_an_approle_logs_in_again_when_its_token_is_over_with_the_files_of_now(vault_at: Desk) -> None:
    vault = vault_at.approle(ttl_s=60, uses=1)
    await vault.header(OPENAI)
    vault_at.secret_file.write_text(vault_at.server.secret_id(uses=1))
    await vault_at.clock.advance(61)
    await vault.header(OPENAI)
    assert vault_at.asked == 4 and vault_at.count(outcome="failed") == 0


async def test_an_approle_that_is_refused_is_named_by_its_files(vault_at: Desk) -> None:
    vault = vault_at.approle()
    vault_at.secret_file.write_text("canary-not-a-secret-id")
    why = await vault_at.refusal(vault)
    assert f"refuses the AppRole in {vault_at.role_file} and {vault_at.secret_file}" in why
    vault_at.secret_file.unlink()
    assert f"the secret-id, {vault_at.secret_file}, cannot be read" in await vault_at.refusal(vault)


async def test_a_login_that_leads_nowhere_is_not_told_as_a_secret_that_is_missing(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle()
    stub.instead = (404, {"errors": ["no handler for route"]}, {})
    assert "could not be read. Vault at 127.0.0.1" in await desk.refusal(vault)
    assert vault.trouble is not None


async def test_a_login_token_is_renewed_at_two_thirds_without_a_secret_id(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle(ttl_s=60, uses=1)
    await vault.header(OPENAI)
    desk.keep(vault)
    await desk.pass_time(39)
    assert stub.asked("auth/token/renew-self") == 0
    await desk.pass_time(2)
    assert stub.asked("auth/token/renew-self") == 1
    await desk.pass_time(200)
    assert stub.asked("auth/token/renew-self") == 6 and stub.asked("auth/approle/login") == 1
    await vault.header(OPENAI)


async def test_a_login_token_near_its_maximum_is_replaced_by_another_login(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle(ttl_s=60, max_s=100)
    await vault.header(OPENAI)
    desk.keep(vault)
    await desk.pass_time(82)  # at 40 it gets 60 more, at 80 it gets 20
    assert stub.asked("auth/approle/login") == 2
    await vault.header(OPENAI)


async def test_a_batch_token_is_replaced_at_two_thirds(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle(ttl_s=60, kind="batch")
    await vault.header(OPENAI)
    await desk.clock.advance(39)
    desk.server.write("secret/data/two", value="canary-number-two")
    await vault.header(Credential(vault_path="secret/data/two"))
    assert stub.asked("auth/approle/login") == 1
    await desk.clock.advance(22)
    await vault.header(OPENAI)
    assert stub.asked("auth/approle/login") == 2 and stub.asked("auth/token/renew-self") == 0


async def test_a_token_that_cannot_be_replaced_is_used_until_it_ends(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle(ttl_s=90, kind="batch", uses=1)
    await vault.header(OPENAI)
    await desk.clock.advance(61)
    await vault.header(OPENAI)
    assert stub.asked("auth/approle/login") == 2
    desk.server.write("secret/data/two", value="canary-number-two")
    await vault.header(Credential(vault_path="secret/data/two"))
    assert stub.asked("auth/approle/login") == 2  # not again for every request
    await desk.clock.advance(61)
    assert "refuses the AppRole" in await desk.refusal(vault)


async def test_a_token_that_is_over_is_replaced_when_somebody_needs_it(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle(ttl_s=30, kind="batch", uses=1)
    await vault.header(OPENAI)
    desk.keep(vault)
    await desk.pass_time(31)
    logins = stub.asked("auth/approle/login")
    assert 2 <= logins <= 6
    await desk.pass_time(100)
    assert stub.asked("auth/approle/login") == logins, "nobody asked for anything"
    await desk.refusal(vault)
    assert stub.asked("auth/approle/login") == logins + 1


async def test_a_login_token_that_was_revoked_is_replaced_once(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle()
    await vault.header(OPENAI)
    stub._end(next(token for token in stub.tokens if token != stub.root))
    desk.server.write("secret/data/two", value="canary-number-two")
    await vault.header(Credential(vault_path="secret/data/two"))
    assert stub.asked("auth/approle/login") == 2
    assert [status for _, path, status in stub.requests if path == "secret/data/two"] == [200, 403, 200]


async def test_a_token_that_vault_cannot_look_up_just_now_is_not_replaced(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle(uses=1)
    stub.forbidden.add("secret/data/openai")

    def busy(method: str, path: str) -> None:
        stub.instead = (503, {"errors": ["canary"]}, {}) if path == "auth/token/lookup-self" else None

    stub.before = busy
    assert "is sealed" in await desk.refusal(vault)
    assert stub.asked("auth/approle/login") == 1


async def test_a_path_that_is_forbidden_costs_no_login(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle(uses=1)
    stub.forbidden.add("secret/data/openai")
    for _ in range(3):
        assert "refuses the token for this: the AppRole in" in await desk.refusal(vault)
    assert stub.asked("auth/approle/login") == 1
    assert isinstance(vault._login, AppRole)


# -- leases ---------------------------------------------------------------------------------------------------------------


async def test_a_dynamic_secret_is_renewed_at_two_thirds_of_its_lease(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault(cache_seconds=1.0)
    desk.keep(vault)
    first = await vault.header(READER)
    assert first.reveal().startswith("dynamic-canary") and desk.leases == 1
    await desk.pass_time(39)
    assert stub.asked("sys/leases/renew") == 0
    await desk.pass_time(161)
    assert stub.asked("sys/leases/renew") == 5 and stub.asked("database/creds/reader") == 1
    assert await vault.header(READER) is first
    await vault.header(Credential(vault_path="database/creds/reader", field="username"))
    assert len(stub.leases) == 1


async def test_a_lease_that_reaches_its_maximum_is_replaced_and_left_to_end(stub: VaultStub, desk: Desk) -> None:
    stub.lease_max_s = 100.0
    vault = desk.vault()
    desk.keep(vault)
    first = await vault.header(READER)
    await desk.pass_time(82)  # at 40 it gets 60 more, at 80 it gets 20
    assert stub.asked("database/creds/reader") == 2 and desk.leases == 1
    assert (await vault.header(READER)).reveal() != first.reveal()
    assert len(stub.leases) == 2, "calls may be under way with the first"
    await vault.stop()
    assert stub.asked("sys/leases/revoke") == 2 and not stub.leases


async def test_a_lease_that_cannot_be_renewed_is_replaced(stub: VaultStub, desk: Desk) -> None:
    stub.lease_renewable = False
    vault = desk.vault()
    desk.keep(vault)
    first = await vault.header(READER)
    await desk.pass_time(41)
    assert (await vault.header(READER)).reveal() != first.reveal()
    assert stub.asked("sys/leases/renew") == 0 and stub.asked("database/creds/reader") == 2


async def test_a_lease_that_is_gone_is_replaced_and_its_secret_not_used_again(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    desk.keep(vault)
    await vault.header(READER)
    stub._end(next(iter(stub.leases)))
    stub.forbidden.add("database/creds/reader")
    await desk.pass_time(41)
    assert "refuses the token" in await desk.refusal(vault, READER)
    stub.forbidden.clear()
    assert (await vault.header(READER)).reveal().startswith("dynamic-canary")


async def test_without_vault_a_lease_goes_on_to_its_end_and_is_renewed_when_vault_is_back(
    stub: VaultStub, desk: Desk
) -> None:
    vault = desk.vault()
    desk.keep(vault)
    first = await vault.header(READER)
    stub.instead = (503, {"errors": ["Vault is sealed"]}, {})
    await desk.pass_time(58)
    assert await vault.header(READER) is first
    assert 2 <= stub.asked("sys/leases/renew") <= 8
    stub.instead = None
    await desk.pass_time(10)
    assert await vault.header(READER) is first and vault.trouble is None
    stub.instead = (503, {"errors": ["Vault is sealed"]}, {})
    await desk.pass_time(70)
    assert "is sealed" in await desk.refusal(vault, READER) and desk.leases == 0
    assert vault.trouble is not None and "is sealed" in vault.trouble


async def test_a_lease_that_vault_has_no_time_to_renew_is_not_replaced(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    desk.keep(vault)
    first = await vault.header(READER)

    def busy(method: str, path: str) -> None:
        stub.instead = (429, {"errors": ["rate limit"]}, {}) if path == "sys/leases/renew" else None

    stub.before = busy
    await desk.pass_time(58)
    assert await vault.header(READER) is first and stub.asked("database/creds/reader") == 1
    assert stub.asked("sys/leases/renew") >= 2


async def test_a_lease_that_may_not_be_renewed_is_good_to_its_end(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    desk.keep(vault)
    first = await vault.header(READER)
    stub.forbidden |= {"sys/leases/renew", "database/creds/reader"}
    await desk.pass_time(58)
    assert await vault.header(READER) is first and stub.asked("database/creds/reader") >= 2


async def test_a_renewal_that_grants_nothing_takes_nothing_away(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    desk.keep(vault)
    first = await vault.header(READER)

    def empty(method: str, path: str) -> None:
        stub.instead = (200, {}, {}) if path == "sys/leases/renew" else (429, {}, {})

    stub.before = empty
    await desk.pass_time(58)
    assert await vault.header(READER) is first and stub.asked("database/creds/reader") >= 2


async def test_a_lease_is_no_longer_good_than_the_token_that_it_was_given_under(stub: VaultStub, desk: Desk) -> None:
    stub.lease_s = 600.0
    vault = desk.approle(ttl_s=60, kind="batch")
    desk.keep(vault)
    first = await vault.header(READER)
    await desk.pass_time(42)
    assert (await vault.header(READER)).reveal() != first.reveal()
    await desk.pass_time(300)
    assert any(READER.vault_path in lease for lease in stub.leases)
    vault = desk.approle(ttl_s=60, kind="batch")
    first = await vault.header(READER)
    await desk.clock.advance(61)  # nobody keeps it
    assert (await vault.header(READER)).reveal() != first.reveal()


async def test_a_lease_under_a_token_that_is_renewed_stays_the_same(stub: VaultStub, desk: Desk) -> None:
    stub.lease_s = 600.0
    vault = desk.approle(ttl_s=60, max_s=6000, uses=1)
    desk.keep(vault)
    first = await vault.header(READER)
    await desk.pass_time(500)
    assert await vault.header(READER) is first and stub.asked("database/creds/reader") == 1


async def test_stopping_revokes_what_was_lent_and_a_login_of_ours(stub: VaultStub, desk: Desk) -> None:
    vault = desk.approle()
    await asyncio.gather(
        *(vault.header(Credential(vault_path=f"database/creds/{name}", field="username")) for name in "abcdef")
    )
    assert desk.leases == 6
    await vault.stop()
    assert stub.asked("sys/leases/revoke") == 6 and not stub.leases and list(stub.tokens) == [stub.root]
    assert desk.leases == 0 and desk.count(outcome="failed") == 0
    count = len(stub.requests)
    await vault.stop()
    assert len(stub.requests) == count
    assert "The daemon is stopping" in await desk.refusal(vault, READER)


async def test_a_lease_that_is_being_given_during_the_stop_is_revoked_too(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    stub.freeze()
    asking = asyncio.create_task(vault.header(READER))
    await eventually(lambda: stub.waiting == 1)
    stopping = asyncio.create_task(vault.stop())
    await asyncio.sleep(0)
    stub.thaw()
    await stopping
    await asyncio.wait({asking})
    assert not stub.leases and stub.asked("sys/leases/revoke") == 1


async def test_who_waits_for_a_frozen_vault_during_the_stop_is_told(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault(timeout_seconds=0.5)
    stub.freeze()
    asking = [asyncio.create_task(desk.refusal(vault)), asyncio.create_task(desk.refusal(vault))]
    await eventually(lambda: stub.waiting == 1)
    await vault.stop()
    for why in await asyncio.gather(*asking):
        assert "The daemon is stopping" in why


async def test_stopping_takes_no_longer_than_vault_may_take(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault(timeout_seconds=0.3)
    await vault.header(READER)
    stub.freeze()
    began = asyncio.get_running_loop().time()
    await vault.stop()
    assert 0.1 < asyncio.get_running_loop().time() - began < 3.0
    assert any("a lease is not revoked" in text for text in desk.told.texts)


# -- a Vault that does not do it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instead", "why"),
    [
        ((503, {"errors": ["Vault is sealed, canary"]}, {}), "is sealed, or down for maintenance"),
        ((500, {"errors": ["1 error occurred: canary"]}, {}), "answers with an error of its own"),
        ((429, {"errors": ["canary"]}, {}), "is asked too often"),
        ((473, b"canary", {}), "is a standby"),
        ((400, b"<html>canary</html>", {}), "takes the request for malformed"),
        ((200, b"<html>canary</html>", {}), "answers with HTTP 200 and not with what was asked for"),
        ((200, {"data": "canary"}, {}), "is no secret"),
        ((200, {"data": {"data": None, "metadata": {}}}, {}), "is no secret"),
        ((200, ["canary"], {}), "answers with HTTP 200 and not with what was asked for"),
        ((200, b"x" * (ANSWER_MAX_BYTES + 1), {}), "it is not Vault"),
        ((200, b"canary", {"Content-Encoding": "gzip"}), "could not be asked"),
    ],
)
async def test_a_vault_that_does_not_do_it_is_told_in_our_words(
    stub: VaultStub, desk: Desk, instead: Any, why: str
) -> None:
    vault = desk.vault()
    stub.instead = instead
    said = await desk.refusal(vault)
    assert why in said and "secret/data/openai" in said
    stub.instead = None
    await vault.header(OPENAI)


async def test_a_vault_that_is_not_there_is_told_without_the_user_in_its_url(desk: Desk, unused_port: int) -> None:
    vault = desk.vault(vault_addr=f"http://user:hidden@127.0.0.1:{unused_port}")
    why = await desk.refusal(vault)
    assert f"Vault at 127.0.0.1:{unused_port} cannot be reached" in why and "hidden" not in why
    assert vault.trouble is not None


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def test_an_outage_is_logged_when_it_begins_and_when_it_ends(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    stub.instead = (503, {"errors": ["Vault is sealed"]}, {})
    for _ in range(3):
        await desk.refusal(vault)
    stub.instead = None
    await vault.header(OPENAI)
    logged = [text for text in desk.told.texts if "Vault is not to be had" in text or "Vault answers again" in text]
    assert ["not to be had" in text for text in logged] == [True, False]


async def test_a_frozen_vault_costs_its_callers_their_time_and_nobody_else_anything(
    stub: VaultStub, desk: Desk
) -> None:
    vault = desk.vault(timeout_seconds=0.6)
    await vault.header(OPENAI)
    stub.freeze()
    loop = asyncio.get_running_loop()
    began = loop.time()
    paths = [Credential(vault_path=f"secret/data/{number}") for number in range(WORKERS * 3)]
    waiting = [asyncio.create_task(vault.header(path)) for path in paths]
    await eventually(lambda: stub.waiting == WORKERS)
    assert (await vault.header(OPENAI)).reveal() == "Bearer sk-canary-openai-1"
    for _ in range(5):
        before = loop.time()
        await asyncio.sleep(0.01)
        assert loop.time() - before < 0.4
    refusals = await asyncio.gather(*waiting, return_exceptions=True)
    assert 0.5 < loop.time() - began < 1.7, "not one after the other"
    assert all(isinstance(why, Unavailable) and "does not answer in time" in why.message for why in refusals)
    stub.thaw()
    desk.server.write("secret/data/3", value="canary-number-three")
    assert (await vault.header(paths[3])).reveal() == "Bearer canary-number-three"


async def test_a_server_that_drips_is_hung_up_on(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault(timeout_seconds=0.3)
    stub.drips = True
    for _ in range(WORKERS + 1):
        assert "does not answer in time" in await desk.refusal(vault)
        await eventually(lambda: not [f for f in vault._lines._stuck if not f.done()])
    stub.drips = False
    await vault.header(OPENAI)


async def test_when_all_requests_hang_the_next_is_refused_at_once(
    stub: VaultStub, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    vault = desk.vault(timeout_seconds=0.2)
    free, really = threading.Event(), socket.getaddrinfo

    def hangs(*args: Any, **options: Any) -> Any:  # a resolver is the one thing that cannot be hung up on
        if threading.current_thread().name.startswith("vault"):
            free.wait(10.0)
        return really(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    paths = [Credential(vault_path=f"secret/data/{number}") for number in range(WORKERS)]
    await asyncio.gather(*(desk.refusal(vault, path) for path in paths))
    asked = desk.asked
    for _ in range(10):
        assert "All 4 requests to Vault at 127.0.0.1" in await desk.refusal(vault)
    assert desk.asked == asked
    stub.drips = True  # who was given up before there was a connection is hung up on when there is one
    free.set()
    await eventually(lambda: all(future.done() for future in vault._lines._stuck))
    stub.drips = False
    await vault.header(OPENAI)


async def test_giving_up_a_request_hangs_up_its_line_and_nobody_elses(desk: Desk) -> None:
    lines, token = desk.vault()._lines, Hidden(desk.token_file.read_text().strip())
    late, early = _Job(), _Job()
    lines._carry_out(late, lambda client: client.read("secret/data/openai"), token)
    late.give_up()  # its line waits for the next one by now
    (line,) = lines._idle
    assert not line.broken
    early.give_up()
    early.has(line)
    assert line.broken
    lines.close()


async def test_a_caller_of_a_frozen_vault_who_is_cancelled_leaves_no_thread_behind(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault(timeout_seconds=60.0)
    stub.freeze()
    asking = asyncio.create_task(vault.header(OPENAI))
    await eventually(lambda: stub.waiting == 1)
    asking.cancel()
    await asyncio.wait({asking})
    await vault._flights.stop(0.0)
    await eventually(lambda: not [f for f in vault._lines._stuck if not f.done()])


# -- what is trusted ------------------------------------------------------------------------------------------------------


async def test_nothing_of_the_environment_is_used(
    stub: VaultStub, desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unused_port: int
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_port}")
    netrc = tmp_path / "netrc"
    netrc.write_text("default login canary password canary\n")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("VAULT_TOKEN", "hvs.canary-of-the-environment")
    vault = desk.approle()
    await vault.header(OPENAI)
    seen = [headers for headers in stub.headers if "python-requests" in headers.get("User-Agent", "")]
    assert len(seen) == 2 and not any("Authorization" in headers for headers in seen)
    assert "X-Vault-Token" not in seen[0]


async def test_no_redirect_is_followed(stub: VaultStub, desk: Desk) -> None:
    vault = desk.vault()
    other = VaultStub(desk.clock.monotonic)
    stub.instead = (307, {}, {"Location": f"{other.url}/v1/secret/data/openai"})
    assert "answers with HTTP 307" in await desk.refusal(vault)
    assert not other.headers
    other.close()


async def test_the_namespace_is_sent(stub: VaultStub, desk: Desk) -> None:
    await desk.vault(vault_namespace="team-a").header(OPENAI)
    assert stub.headers[-1]["X-Vault-Namespace"] == "team-a"


def certificate(directory: Path, name: str, alternative: str) -> tuple[Path, Path]:
    """A certificate that is its own authority, and its key."""
    crt, key = directory / f"{name}.crt", directory / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}", "-keyout", str(key), "-out", str(crt)],
        check=True, capture_output=True,
    )  # fmt: skip
    return crt, key


@pytest.mark.parametrize(
    ("alternative", "trusted", "why"),
    [
        ("IP:127.0.0.1", "own", None),
        ("IP:127.0.0.1", "other", "shows a certificate that is not trusted"),
        ("IP:127.0.0.1", None, "shows a certificate that is not trusted"),
        ("IP:127.0.0.1", "system", None),
        ("DNS:vault.example", "own", "shows a certificate that is not trusted"),
        ("IP:127.0.0.1", "absent", "cannot be used: No such file or directory"),
        ("IP:127.0.0.1", "garbage", "cannot be used"),
    ],
)
async def test_vault_is_who_its_certificate_says(
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    alternative: str,
    trusted: str | None,
    why: str | None,
) -> None:
    crt, key = certificate(tmp_path, "own", alternative)
    certificate(tmp_path, "other", alternative)
    (tmp_path / "garbage.crt").write_text("canary")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(crt, key)
    secure = VaultStub(desk.clock.monotonic, tls=context)
    secure.secrets["secret/data/openai"] = {"api_key": "sk-canary-openai-1"}
    secure.tokens["hvs.canary-token"] = secure.tokens[secure.root]
    desk.token_file.write_text("hvs.canary-token")
    # what requests brings along is not trusted, and no certificate of the environment is shown
    monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(crt))
    monkeypatch.setattr("hvac.v1.VAULT_CLIENT_CERT", str(tmp_path / "absent.crt"))
    if trusted == "system":
        monkeypatch.setenv("SSL_CERT_FILE", str(crt))
    ca = None if trusted in (None, "system") else str(tmp_path / f"{trusted}.crt")
    vault = desk.vault(vault_addr=secure.url, ca_cert=ca)
    if why is None:
        await vault.header(OPENAI)
    else:
        assert why in await desk.refusal(vault)
        assert not secure.requests
    await vault.stop()
    secure.close()


async def test_a_frozen_vault_behind_tls_is_hung_up_on_too(desk: Desk, tmp_path: Path) -> None:
    crt, key = certificate(tmp_path, "own", "IP:127.0.0.1")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(crt, key)
    secure = VaultStub(desk.clock.monotonic, tls=context)
    secure.secrets["secret/data/openai"] = {"api_key": "sk-canary-openai-1"}
    secure.tokens["hvs.canary-token"] = secure.tokens[secure.root]
    desk.token_file.write_text("hvs.canary-token")
    vault = desk.vault(vault_addr=secure.url, ca_cert=str(crt), timeout_seconds=0.5)
    secure.drips = True
    assert "does not answer in time" in await desk.refusal(vault)
    await eventually(lambda: not [f for f in vault._lines._stuck if not f.done()])
    secure.drips = False
    await vault.header(OPENAI)
    await vault.stop()
    secure.close()
