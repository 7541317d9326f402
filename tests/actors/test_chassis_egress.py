"""A guest that calls out, from its own code to a server and back: with a secret of Vault's, a claim, and a breaker."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ifabric.clock import monotonic
from ifabric.errors import ClaimLost, EgressDenied, FabricError, LimitReached
from tests.actors.conftest import World
from tests.actors.test_egress import Answer, Seen, Site, by_path, http
from tests.actors.vault_stub import VaultStub
from tests.guests.build import guest

SECRET = "sk-canary-of-the-provider"


@pytest.fixture
def vault() -> Iterator[VaultStub]:
    """Vault's stub, with a secret in it."""
    made = VaultStub(monotonic)
    made.secrets["secret/data/llm"] = {"api_key": SECRET}
    yield made
    made.close()


@pytest.fixture
async def provider() -> AsyncIterator[Site]:
    """A server that tells its caller what it was sent, credential and all."""

    async def echo(seen: Seen, writer: asyncio.StreamWriter) -> None:
        told = json.dumps({"path": seen.target, "headers": seen.headers, "body": seen.body.decode()}).encode()
        writer.write(http(told, "200 OK", "Content-Type: application/json", f"X-Echo: {seen.headers['authorization']}"))

    async def slow(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.get_running_loop().create_future()

    answers: dict[str, bytes | Answer] = {"slow": slow, "down": http(b"no", "503 Gone"), "rest": echo}
    async with Site(by_path(**answers)) as site:
        yield site


def section(provider: Site, vault: VaultStub, folder: Path, **endpoint: Any) -> dict[str, Any]:
    """The chassis's configuration with one endpoint, `llm`, and another that Vault is not needed for."""
    token = folder / "token"
    token.write_text(vault.root + "\n")
    credential = {"vault_path": "secret/data/llm", "field": "api_key"}
    both = {"url": provider.url + "/v1", "methods": ["GET", "POST"], "networks": ["127.0.0.0/8"]}
    return {
        "endpoints": {"llm": {**both, "credential": credential, **endpoint}, "open": {**both, "url": provider.url}},
        "credentials": {"vault_addr": vault.url, "vault_token_path": str(token), "timeout_seconds": 1.0},
    }


async def fetch(world: World, *args: str, session: str = "a", **request: Any) -> dict[str, Any]:
    """The response that the guest printed."""
    wasm = base64.b64encode(guest("fetch")).decode()
    module = (await world.ask("put", session, component="chassis", timeout_s=20, wasm=wasm))["module"]
    answer = await world.ask("run", session, component="chassis", timeout_s=20, module=module, args=args, **request)
    assert answer["exit_code"] == 0, answer
    response: dict[str, Any] = json.loads(answer["stdout"])
    return {**response, "usage": answer["usage"]}


async def denied(world: World, *args: str, **request: Any) -> FabricError:
    with pytest.raises(FabricError) as error:
        await fetch(world, *args, **request)
    return error.value


async def test_the_secret_reaches_the_provider_and_never_the_guest_nor_a_log(
    world: World, provider: Site, vault: VaultStub, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    await world.daemon(chassis=section(provider, vault, tmp_path))
    response = await fetch(world, "llm", "POST", "/chat", "hi", endpoints=["llm"])
    (seen,) = provider.seen
    assert seen.headers["authorization"] == f"Bearer {SECRET}"
    assert (seen.method, seen.target, seen.body) == ("POST", "/v1/chat", b"hi")
    assert response["status"] == 200
    assert json.loads(response["body"])["headers"]["authorization"] == "Bearer [redacted]" or "[redacted]" in str(
        response
    )
    told = json.dumps(response) + caplog.text + "".join(capfd.readouterr())
    assert SECRET not in told
    assert base64.b64encode(SECRET.encode()).decode() not in told
    assert vault.root not in told
    assert response["usage"]["egress_calls"] == 1
    assert response["usage"]["egress_bytes"] > 100


@pytest.mark.parametrize(
    ("args", "endpoints", "why"),
    [
        (("llm", "GET", "/x"), ["open"], "llm"),
        (("elsewhere", "GET", "/x"), ["llm"], "elsewhere"),
        (("llm", "DELETE", "/x"), ["llm"], "DELETE"),
        (("llm", "GET", "/../admin"), ["llm"], ".."),
        (("llm", "GET", "//evil.example/"), ["llm"], "//"),
    ],
)
async def test_what_no_endpoint_allows_ends_the_run_and_nothing_is_sent(
    world: World,
    provider: Site,
    vault: VaultStub,
    tmp_path: Path,
    args: tuple[str, ...],
    endpoints: list[str],
    why: str,
) -> None:
    await world.daemon(chassis=section(provider, vault, tmp_path))
    error = await denied(world, *args, endpoints=endpoints)
    assert isinstance(error, EgressDenied)
    assert why in json.dumps(error.to_body())
    assert provider.seen == []


async def test_an_address_that_is_nobodys_to_reach_ends_the_run(
    world: World, provider: Site, vault: VaultStub, tmp_path: Path
) -> None:
    config = section(provider, vault, tmp_path)
    config["endpoints"]["open"]["networks"] = []
    await world.daemon(chassis=config)
    error = await denied(world, "open", "GET", "/x", endpoints=["open"])
    assert isinstance(error, EgressDenied)
    assert "loopback" in json.dumps(error.to_body())
    assert provider.opened == 0


async def test_with_vault_down_a_run_that_needs_a_secret_does_not_start_and_others_go_on(
    world: World, provider: Site, vault: VaultStub, tmp_path: Path
) -> None:
    await world.daemon(chassis=section(provider, vault, tmp_path))
    vault.freeze()
    error = await denied(world, "llm", "GET", "/x", endpoints=["llm"])
    assert (error.code, error.facts["what"]) == ("unavailable", "vault")
    assert provider.seen == []
    vault.thaw()
    assert (await fetch(world, "llm", "GET", "/x", endpoints=["llm"]))["status"] == 200


async def test_a_call_under_a_claim_carries_its_fence_and_ends_with_it(
    world: World, provider: Site, vault: VaultStub, tmp_path: Path
) -> None:
    await world.daemon(chassis=section(provider, vault, tmp_path))
    await world.ask("hello", "a")
    await world.ask("submit", "a", tasks=[{"id": "t.1"}])
    fence = (await world.ask("claim", "a", task="t.1"))["fence"]
    await fetch(world, "llm", "GET", "/x", endpoints=["llm"], task="t.1", fence=fence)
    headers = provider.seen[0].headers
    assert (headers["x-ifabric-task"], headers["x-ifabric-fence"]) == ("t.1", str(fence))
    running = asyncio.create_task(denied(world, "open", "GET", "/slow", endpoints=["open"], task="t.1", fence=fence))
    async with asyncio.timeout(10):
        while len(provider.seen) < 2:
            await asyncio.sleep(0.01)
    await world.ask("release", "a", task="t.1", fence=fence)
    assert isinstance(await running, ClaimLost)


async def test_a_call_that_is_never_answered_ends_with_the_run(
    world: World, provider: Site, vault: VaultStub, tmp_path: Path
) -> None:
    await world.daemon(chassis=section(provider, vault, tmp_path))
    error = await denied(world, "open", "GET", "/slow", endpoints=["open"], limits={"wall_s": 0.3})
    assert isinstance(error, LimitReached)
    assert error.facts["which"] == "wall_s"


async def test_a_breaker_that_is_open_is_told_to_the_guest_and_failures_open_it(
    world: World, provider: Site, vault: VaultStub, tmp_path: Path
) -> None:
    config = section(provider, vault, tmp_path)
    config["endpoints"]["open"]["breaker"] = "provider"
    await world.daemon(governor={"circuit_breaker": {"failure_threshold": 2, "minimum_calls": 2}}, chassis=config)
    for _ in range(2):
        assert (await fetch(world, "open", "GET", "/down", endpoints=["open"]))["status"] == 503
    answer = await fetch(world, "open", "GET", "/down", endpoints=["open"])
    assert answer["error"]["code"] == "breaker_open"
    assert answer["error"]["probe_in_s"] > 0
    assert len(provider.seen) == 2
