"""The tree of verbs, and what becomes of an error."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from ifabric import __version__
from ifabric.errors import ConfigError, FabricError, Unavailable, Unreachable

OK, FAILED, USAGE, UNREACHABLE = 0, 1, 2, 3

app = App(
    name="ifabric",
    version=f"ifabric {__version__}",
    help="""The coordination fabric for swarms of agents: a task that nobody else has, over NATS, decided by etcd.

    Without a verb it runs a daemon (`ifabric run`), with servers of its own unless others are configured.

    Examples:

        ifabric demo                      a swarm on this machine, start to end
        ifabric run                       a daemon
        ifabric board load TASKS.md       put a Markdown task board on it
        ifabric task list                 see what is there
        ifabric watch                     see what happens

    Every verb takes --json for machines. Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 nothing answers.""",
    help_format="plaintext",
)
task = App(name="task", help="Tasks: look at them, take them, end them.")
board = App(name="board", help="Boards: put many tasks there at once.")
svc = App(name="svc", help="The daemon's services, as any NATS client discovers them (ADR-32).")
for group in (board, task, svc):
    app.command(group)

#: every verb: its name, where it is, and the line that `--help` of its group shows
VERBS = (
    ("run", "ifabric.cli.run:run", "Run a daemon (the default)."),
    ("demo", "ifabric.cli.demo:demo", "A swarm on this machine, start to end, checked."),
    ("check-config", "ifabric.cli.run:check_config", "Say what is wrong with configuration files."),
    ("status", "ifabric.cli.ops:status", "The daemon on this machine: health, tasks, sessions."),
    ("smoke", "ifabric.cli.smoke:smoke", "The runbook's three smoke tests against a running daemon."),
    ("watch", "ifabric.cli.watch:watch", "What happens, as it happens."),
    ("asyncapi", "ifabric.cli.ops:asyncapi", "The wire protocol as AsyncAPI 3."),
    ("board load", "ifabric.cli.board:load", "Put a Markdown, YAML or JSON board there."),
    ("task list", "ifabric.cli.task:list_", "Tasks, by state."),
    ("task show", "ifabric.cli.task:show", "One task, with its history."),
    ("task claim", "ifabric.cli.task:claim", "Take a task by its id."),
    ("task next", "ifabric.cli.task:next_", "Take the best task there is."),
    ("task renew", "ifabric.cli.task:renew", "Keep what a session holds."),
    ("task complete", "ifabric.cli.task:complete", "The work is done."),
    ("task fail", "ifabric.cli.task:fail", "The attempt failed."),
    ("task release", "ifabric.cli.task:release", "Give a task back."),
    ("task cancel", "ifabric.cli.task:cancel", "Take a task off the board (operators)."),
    ("task requeue", "ifabric.cli.task:requeue", "Put a dead or cancelled task back (operators)."),
    ("task purge", "ifabric.cli.task:purge", "Delete a finished task (operators)."),
    ("svc ls", "ifabric.cli.svc:ls", "The services that answer."),
    ("svc info", "ifabric.cli.svc:info", "Their endpoints."),
    ("svc stats", "ifabric.cli.svc:stats", "Their requests, errors and times."),
)


def _register() -> None:
    """The verbs, by module and function. Resolved when one is called."""
    for name, target, says in VERBS:
        *nouns, verb = name.split()
        group = {"board": board, "task": task, "svc": svc}[nouns[0]] if nouns else app
        group.command(target, name=verb, help=says)
    app.register_install_completion_command()


def run_app(arguments: Sequence[str], *, debug: bool) -> int:
    """Parses and runs. An error is one clear sentence on stderr."""
    from ifabric.cli.output import complain

    _register()
    given = list(arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("--help", "-h", "--version")):
        given.insert(0, "run")  # the default verb
    try:
        code = app(given, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        return USAGE
    except KeyboardInterrupt:
        return 130
    except FabricError as error:
        if debug:
            traceback.print_exc()
        complain(error)
        if isinstance(error, ConfigError):
            return USAGE
        gone = isinstance(error, Unreachable) or (isinstance(error, Unavailable) and error.facts.get("what") == "nats")
        return UNREACHABLE if gone else FAILED
    except asyncio.CancelledError:
        return 130
    return code if isinstance(code, int) else OK
