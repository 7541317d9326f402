"""How a run ended: what the guest wrote and took, whether it came to its own end or was ended."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import msgspec

from ifabric.errors import CallerError, FabricError
from ifabric.wire.chassis import RunUsage


@dataclass(frozen=True)
class Output:
    """What a guest wrote, and what it took."""

    run: str
    stdout: bytes
    stderr: bytes
    #: something it wrote did not fit into `output_bytes`, and is not here
    truncated: bool
    #: None: it was not told
    usage: RunUsage | None

    @property
    def text(self) -> str:
        """`stdout` as text; what is not UTF-8 in it is replaced."""
        return self.stdout.decode("utf-8", "replace")


@dataclass(frozen=True)
class Result(Output):
    """A run that came to its own end, with whatever exit code."""

    usage: RunUsage
    exit_code: int

    def check(self) -> None:
        """Raises `ExitStatus` unless the exit code is 0."""
        if self.exit_code != 0:
            raise ExitStatus(self)


class ExitStatus(CallerError):
    """The guest came to its own end with another exit code than 0. `result` has all of it."""

    def __init__(self, result: Result) -> None:
        said = result.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2][:200]
        more = f": {said}" if said else ""
        super().__init__(
            f"the guest ended with exit code {result.exit_code}{more}", run=result.run, exit_code=result.exit_code
        )
        self.result = result


def output_of(error: FabricError) -> Output | None:
    """What the run wrote until it was ended by this error; None when none had begun, or nobody knows."""
    facts = error.facts
    if isinstance(error, ExitStatus):
        return error.result
    if "run" not in facts or "usage" not in facts:
        return None
    try:
        usage: RunUsage | None = msgspec.convert(facts["usage"], RunUsage)
    except msgspec.ValidationError:
        usage = None
    return Output(
        run=str(facts["run"]),
        stdout=written(facts.get("stdout"), facts.get("stdout_b64")),
        stderr=written(facts.get("stderr"), facts.get("stderr_b64")),
        truncated=bool(facts.get("truncated", False)),
        usage=usage,
    )


def written(text: Any, b64: Any) -> bytes:
    """One of the pair that carries a stream."""
    if isinstance(b64, str):
        try:
            return base64.b64decode(b64, validate=True)
        except binascii.Error:
            raise FabricError("the answer to run is not one: its output is not base64") from None
    return text.encode() if isinstance(text, str) else b""
