"""`ifabric run` and `ifabric check-config`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from ifabric.cli.options import Json
from ifabric.cli.output import complain, err, out, plain, print_json
from ifabric.config import Config
from ifabric.errors import ConfigError, FabricError

Configs = Annotated[
    tuple[Path, ...],
    Parameter(name=["--config", "-c"], negative="", help="A YAML file; several are merged, later ones win."),
]


def run(
    *,
    config: Configs = (),
    state_dir: Annotated[Path | None, Parameter(help="Where data and endpoints.json live.")] = None,
    actors: Annotated[str | None, Parameter(help="Which actors to host, separated by commas.")] = None,
) -> int:
    """Run a daemon until SIGTERM or Ctrl-C.

    Without a configuration it starts an etcd and a nats-server of its own on
    loopback and keeps their data in its state directory.

    For example:

        ifabric run
        ifabric run --config /etc/infrafabric/fabric.yaml --actors coordinator
    """
    import signal

    import uvloop

    from ifabric import log
    from ifabric.config_file import load
    from ifabric.endpoints import default_state_dir
    from ifabric.fabric import exit_code, serve
    from ifabric.references import resolve

    loaded, warnings = load(config, os.environ)
    if actors:
        loaded = msgspec.structs.replace(
            loaded, actors=tuple(dict.fromkeys(name.strip() for name in actors.split(",") if name.strip()))
        )
    for number in (signal.SIGTERM, signal.SIGINT):  # until the loop takes over: nothing is there yet to be ended
        signal.signal(number, lambda *_: sys.exit(0))
    folder = state_dir or (Path(loaded.state_dir) if loaded.state_dir else default_state_dir())
    logging = loaded.coordinator.logging
    log.setup(logging.level, logging.format, logging.output, logging.repeats_per_minute)
    for warning in warnings:
        log.get().warning(warning)
    try:
        secrets = resolve(loaded, folder.resolve(), os.environ)
        code: int = uvloop.run(serve(secrets.config, state_dir=folder.resolve(), refresh=secrets.refresh))
        return code
    except ConfigError:
        raise
    except FabricError as error:
        log.get().error("could not start", reason=str(error))
        if logging.output != "stderr":  # whoever started it is not left without a word
            complain(error)
        return exit_code(error)
    except Exception as error:  # of a resident: it belongs into the log, with its place, wherever the log goes
        log.get().exception("the daemon has failed", reason=repr(error))
        return 1


def check_config(
    *files: Annotated[Path, Parameter(help="YAML files; later ones win over earlier ones.")], json: Json = False
) -> int:
    """Say what is wrong with configuration files, by file, line and key.

    Exit 2 if anything is.

    For example:

        ifabric check-config config/fabric.yaml
        ifabric check-config base.yaml production.yaml
    """
    from ifabric.config_file import load
    from ifabric.references import find

    try:
        loaded, warnings = load(files, os.environ)
        find(loaded)
    except ConfigError as error:
        problems = error.message.splitlines()
        if json:
            print_json({"ok": False, "errors": problems})
        else:
            for line in problems:
                err.print(f"[red]✘[/] {plain(line)}")
        return 2
    if json:
        print_json({"ok": True, "warnings": warnings, "config": loaded})
        return 0
    for warning in warnings:
        out.print(f"[yellow]![/] {plain(warning)}")
    out.print(f"[green]✔[/] {len(files)} file(s), {_summary(loaded)}")
    return 0


def _summary(config: Config) -> str:
    etcd = config.coordinator.etcd.endpoints
    nats = config.nats.servers
    return (
        f"etcd {', '.join(etcd) if etcd else 'embedded'}, NATS {', '.join(nats) if nats else 'embedded'}, "
        f"actors {', '.join(config.actors)}"
    )
