"""Reads secrets from Vault, once and to the end: for a start, which has nothing better to do than to wait.

(A chassis reads them while it works, keeps them and tends their leases: it has a reader of its own.) hvac's and
requests' errors carry URLs, bodies and sometimes the token; what is said here is said in our words.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self
from urllib.parse import urlsplit

import hvac  # type: ignore[import-untyped]
import requests

from ifabric.config_ops import Vault
from ifabric.errors import ConfigError, Unreachable

VALUE_MAX_BYTES = 256 * 1024
FILE_MAX_BYTES = 64 * 1024
#: statuses with which it may answer the same request later: no quorum, too often, standby, never set up, sealed
_LATER = (412, 429, 472, 473, 500, 501, 502, 503)
_ELSEWHERE = (301, 302, 303, 307, 308)


class Wanted(Protocol):
    """What is to be read."""

    @property
    def path(self) -> str: ...

    @property
    def field(self) -> str: ...


class _Answer(NamedTuple):
    status: int
    body: dict[str, Any]


def read(vault: Vault, wanted: Mapping[str, Wanted]) -> dict[str, bytes]:
    """The values by the keys of `wanted`. `Unreachable`: Vault cannot be asked now. `ConfigError`: it refuses, or has
    not what is asked for. Both name what was not read.
    """
    names = ", ".join(wanted)
    with _Asking(vault, names) as asking:
        token, is_ours = asking.token()
        try:
            answers = {path: asking.get(path, token) for path in dict.fromkeys(one.path for one in wanted.values())}
        finally:
            if is_ours:
                asking.revoke(token)
    return {key: _value(key, one, answers[one.path], asking.where) for key, one in wanted.items()}


class _Asking:
    """One conversation with Vault."""

    def __init__(self, vault: Vault, names: str) -> None:
        assert vault.addr is not None, "it was checked with the references"
        self._vault = vault
        #: without the user and password that a URL may hold
        self.where = "Vault at " + urlsplit(vault.addr).netloc.rpartition("@")[2]
        self._names = names
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy would be the wiser for our token
        self._session.verify = vault.ca_cert or True  # of a session that it is given, hvac takes this and not its own

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def token(self) -> tuple[str, bool]:
        """With which to ask, and whether it was made for us."""
        vault = self._vault
        if vault.token_path is not None:
            return self._file(vault.token_path, "vault.token_path"), False
        assert vault.role_id_path is not None
        assert vault.secret_id_path is not None
        role = self._file(vault.role_id_path, "vault.role_id_path")
        secret = self._file(vault.secret_id_path, "vault.secret_id_path")
        answer = self._ask(lambda client: client.auth.approle.login(role, secret, use_token=False), "")
        token = (answer.body.get("auth") or {}).get("client_token")
        if answer.status != 200 or not isinstance(token, str):
            raise ConfigError(
                f"{self.where} does not let the AppRole in (HTTP {answer.status}): the secret-id is used up, has ended, or is of "
                f"another role; {self._names} cannot be read"
            )
        return token, True

    def get(self, path: str, token: str) -> _Answer:
        """A secret."""
        return self._ask(lambda client: client.read(path), token)

    def revoke(self, token: str) -> None:
        """A token that was made for us. One that cannot be revoked ends by itself."""
        with contextlib.suppress(Unreachable):
            self._ask(lambda client: client.auth.token.revoke_self(), token)

    def _file(self, path: str, key: str) -> str:
        try:
            with Path(path).open("rb") as file:
                text = file.read(FILE_MAX_BYTES).decode("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not ASCII"
            raise ConfigError(f"{key}: cannot read {path}: {why}; {self._names} cannot be read without it") from None
        if not text or not all("!" <= letter <= "~" for letter in text):
            raise ConfigError(f"{key}: {path} is to hold one line without spaces; {self._names} cannot be read")
        return text

    def _ask(self, call: Callable[[Any], Any], token: str) -> _Answer:
        """In a thread, because the timeouts of `requests` bound each step and not their sum."""
        made: list[_Answer | str] = []
        client = hvac.Client(
            url=self._vault.addr,
            token=token,
            timeout=self._vault.timeout_seconds,
            allow_redirects=False,  # it would carry the token along
            session=self._session,
            namespace=self._vault.namespace,
        )
        thread = threading.Thread(target=lambda: made.append(_tried(client, call)), name="vault", daemon=True)
        thread.start()
        thread.join(self._vault.timeout_seconds * 2)
        answer = made[0] if made else "does not answer in time"
        if isinstance(answer, str) or answer.status in (*_LATER, *_ELSEWHERE):
            why = answer if isinstance(answer, str) else f"is sealed or busy (HTTP {answer.status})"
            if not isinstance(answer, str) and answer.status in _ELSEWHERE:
                why = f"sends us elsewhere (HTTP {answer.status}), and a token does not follow: name the active one in vault.addr"
            raise Unreachable(f"{self.where} {why}; {self._names} could not be read, and nothing was started with them")
        return answer


def _tried(client: Any, call: Callable[[Any], Any]) -> _Answer | str:
    """What came of it; a text when nothing did."""
    seen: list[int] = []
    client.adapter.session.hooks["response"] = [lambda response, *_, **__: seen.append(response.status_code)]
    try:
        body = call(client)
    except hvac.exceptions.VaultError:
        return _Answer(seen[-1] if seen else 0, {})
    except requests.exceptions.SSLError:
        return "shows a certificate that is not trusted, or does not speak TLS"
    except requests.exceptions.Timeout:
        return "does not answer in time"
    except requests.exceptions.RequestException:
        return "cannot be reached, or hung up"
    except Exception as error:  # of any kind: what it says may hold the token
        return f"could not be asked ({type(error).__name__})"
    if not isinstance(body, dict):  # hvac's None is a 404
        return _Answer(404 if body is None else seen[-1], {})
    return _Answer(seen[-1], body)


def _value(key: str, one: Wanted, answer: _Answer, where: str) -> bytes:
    """The bytes of a field. `ConfigError` says what is missing, and what else there is."""
    asked = f"{key}: {where}"
    if answer.status == 403:
        raise ConfigError(f"{asked} does not let this token read {one.path}")
    data = answer.body.get("data")
    if answer.status != 200 or not isinstance(data, dict):
        raise ConfigError(f"{asked} has no secret at {one.path} (HTTP {answer.status}); KV version 2 has `data/` in it")
    if isinstance(data.get("metadata"), dict) and "data" in data:  # KV version 2
        data = data["data"]
    if not isinstance(data, dict) or one.field not in data:
        there = ", ".join(sorted(data)) if isinstance(data, dict) and data else "none"
        raise ConfigError(f"{asked} has no field {one.field} in {one.path}; the fields there: {there}")
    value = data[one.field]
    if not isinstance(value, str) or not value or len(value.encode()) > VALUE_MAX_BYTES:
        raise ConfigError(f"{asked}: {one.path}#{one.field} is no text of 1 to {VALUE_MAX_BYTES} bytes")
    return value.encode()
