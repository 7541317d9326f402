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
    str | None,
    Parameter(
        name=["--session", "-s"],
        env_var="IFABRIC_SESSION",
        help="Whose claim it is: letters, digits, _ -. A credential says it by itself.",
    ),
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
    credentials: Annotated[
        Path | None, Parameter(help="The file that `ifabric agent create` made. Default: $IFABRIC_CREDENTIALS.")
    ] = None
    ca: Annotated[
        Path | None, Parameter(help="Authorities to trust, in PEM. Default: $IFABRIC_CA, or the system's.")
    ] = None

    def words(self) -> str:
        """These options again, for a command that is printed to be copied."""
        given = {
            "nats": self.nats,
            "state-dir": self.state_dir,
            "credentials": self.credentials,
            "ca": self.ca,
        }
        return "".join(f" --{name} {value}" for name, value in given.items() if value)
