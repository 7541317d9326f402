"""What all sections of the configuration are made of."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

Port = Annotated[int, Meta(ge=0, le=65535)]
Positive = Annotated[float, Meta(gt=0, le=86_400)]
Count = Annotated[int, Meta(ge=1)]
#: so much in micro-USD is still exact in every JSON reader
USD_MAX = 9_000_000_000
Share = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A map of the configuration."""


class MetricsPort(Section, frozen=True, kw_only=True):
    """Where Prometheus scrapes. Without a port, on the HTTP port."""

    enabled: bool = True
    port: Port | None = None
    path: Annotated[str, Meta(pattern="^/")] = "/metrics"


class Logging(Section, frozen=True, kw_only=True):
    """What is logged, in which form, and where to."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["json", "text", "auto"] = "auto"
    output: Name = "stderr"
    repeats_per_minute: Annotated[int, Meta(ge=0, le=1_000_000)] = 60
