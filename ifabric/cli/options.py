"""The options that many verbs share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.errors import ConfigError

Json = Annotated[bool, Parameter(help="JSON on stdout, for machines.")]
Task = Annotated[str, Parameter(help="The task's id.")]
Session = Annotated[
    str, Parameter(name=["--session", "-s"], env_var="IFABRIC_SESSION", help="Whose claim it is: letters, digits, _ -.")
]


def amount(usd: str | None, name: str) -> int | None:
    """An amount that was written in USD, as micro-USD. `ConfigError` when it is none."""
    from ifabric.spending import micro_usd

    try:
        return None if usd is None else micro_usd(usd)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


@Parameter(name="*")
@dataclass(frozen=True)
class Where:
    """Where the fabric is."""

    nats: Annotated[
        str | None, Parameter(help="NATS URLs, comma-separated. Default: $IFABRIC_NATS, or this machine's daemon.")
    ] = None
    state_dir: Annotated[Path | None, Parameter(help="State directory of this machine's daemon.")] = None
    timeout: Annotated[float, Parameter(help="Seconds to try.", validator=Number(gt=0, lte=3600))] = 5.0

    def words(self) -> str:
        """These options again, for a command that is printed to be copied."""
        nats = f" --nats {self.nats}" if self.nats else ""
        return nats + (f" --state-dir {self.state_dir}" if self.state_dir else "")
