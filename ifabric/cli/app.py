"""The tree of verbs, and what becomes of an error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter

from ifabric import __version__
from ifabric.errors import ConfigError, FabricError, Unavailable, Unreachable

OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130

HELP = """The coordination fabric for swarms of agents: a task that nobody else has, over NATS, decided by etcd.

    Without a verb it runs a daemon (`ifabric run`), with servers of its own unless others are configured.

    For example:

        ifabric demo                      a swarm on this machine, start to end
        ifabric run                       a daemon
        ifabric board load TASKS.md       put a Markdown task board on it
        ifabric task list                 see what is there
        ifabric watch                     see what happens
        ifabric sandbox run TOOL.wasm     run what is not trusted

    Every verb but `run` takes --json for machines. NO_COLOR is respected.
    IFABRIC_DEBUG=1 shows where an error comes from.
    Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 nothing answers."""
GROUPS = {
    "board": "Boards: put many tasks there at once.",
    "task": "Tasks: look at them, take them, end them.",
    "budget": "Money: limits, what is spent and held, who spent it.",
    "breaker": "Breakers: what is left alone because it fails.",
    "sandbox": "Sandboxes: run untrusted WebAssembly, and see what runs.",
    "match": "Matching: who can take a task, and why nobody does.",
    "agent": "Identities: who may speak to the fabric, and as whom.",
    "bootstrap": "Begin a production: certificates, etcd's roles, NATS's keys.",
    "audit": "The audit: who did what, and whether that is all and true.",
    "backup": "Backups: etcd, the streams and the modules in one encrypted file.",
    "maintenance": "Maintenance of etcd: compaction, defragmentation.",
    "member": "Members of the etcd cluster, and how to replace one.",
    "svc": "The daemon's services, as any NATS client discovers them (ADR-32).",
}
#: every verb: its name, where it is, and the line that the help of its group shows
VERBS = (
    ("run", "ifabric.cli.run:run", "Run a daemon (the default)."),
    ("demo", "ifabric.cli.demo:demo", "A swarm on this machine, start to end, checked."),
    ("check-config", "ifabric.cli.run:check_config", "Say what is wrong with configuration files."),
    ("status", "ifabric.cli.ops:status", "The daemon of this machine: health, tasks, sessions."),
    ("smoke", "ifabric.cli.smoke:smoke", "The runbook's three smoke tests against a running daemon."),
    ("watch", "ifabric.cli.watch:watch", "What happens, as it happens."),
    ("top", "ifabric.cli.top:top", "The daemon at a glance, second by second."),
    ("explain", "ifabric.cli.explain:explain", "The story of a task, session, account or breaker, and what to do."),
    ("playbook", "ifabric.cli.playbook:playbook", "What to do when something is wrong, a page an incident."),
    ("asyncapi", "ifabric.cli.ops:asyncapi", "The wire protocol as AsyncAPI 3."),
    ("metrics", "ifabric.cli.metrics:metrics", "What the metrics of a daemon mean."),
    ("board load", "ifabric.cli.board:load", "Put a Markdown, YAML or JSON board there."),
    ("board import-git", "ifabric.cli.importing:import_git", "Bring a board, with its claims, from a git repository."),
    ("task list", "ifabric.cli.task:list_", "Tasks, by state."),
    ("task show", "ifabric.cli.task:show", "One task, with its history."),
    ("task claim", "ifabric.cli.holding:claim", "Take a task by its id."),
    ("task next", "ifabric.cli.holding:next_", "Take the best task there is."),
    ("task renew", "ifabric.cli.holding:renew", "Keep what a session holds."),
    ("task complete", "ifabric.cli.holding:complete", "The work is done."),
    ("task fail", "ifabric.cli.holding:fail", "The attempt failed."),
    ("task release", "ifabric.cli.holding:release", "Give a task back."),
    ("task cancel", "ifabric.cli.task:cancel", "Take a task off the board (operators)."),
    ("task requeue", "ifabric.cli.task:requeue", "Put a dead or cancelled task back (operators)."),
    ("task purge", "ifabric.cli.task:purge", "Delete a finished task (operators)."),
    ("budget show", "ifabric.cli.budget:show", "What accounts may spend, have spent and hold."),
    ("budget set", "ifabric.cli.budget:set_", "Limit an account (operators)."),
    ("budget holds", "ifabric.cli.budget:holds", "The holds that are open."),
    ("budget statement", "ifabric.cli.statement:statement", "What an account was charged, entry by entry."),
    ("breaker list", "ifabric.cli.breaker:list_", "Breakers, and when their next probe may go."),
    ("breaker open", "ifabric.cli.breaker:open_", "Let nothing through until it is closed (operators)."),
    ("breaker close", "ifabric.cli.breaker:close", "Let everything through again (operators)."),
    ("sandbox run", "ifabric.cli.guest:run", "Run a WebAssembly module, and be it to your shell."),
    ("sandbox put", "ifabric.cli.sandbox:put", "Keep modules, to be run by their ids."),
    ("sandbox list", "ifabric.cli.sandbox:list_", "The modules that are kept."),
    ("sandbox inspect", "ifabric.cli.sandbox:inspect", "What is in a module, and why it would be refused."),
    ("sandbox ps", "ifabric.cli.sandbox:ps", "What runs now, the workers and the service level."),
    ("sandbox kill", "ifabric.cli.sandbox:kill", "End a run (operators)."),
    ("match explain", "ifabric.cli.match:explain", "Who can take a task, and why the others cannot."),
    ("agent create", "ifabric.cli.agent:create", "Make a credential for an agent or an operator (operators)."),
    ("agent list", "ifabric.cli.agent:list_", "Who there is (operators)."),
    ("agent rotate", "ifabric.cli.agent:rotate", "Give an agent a new key (operators)."),
    ("agent revoke", "ifabric.cli.agent:revoke", "Let an agent in no more, and end its connections (operators)."),
    ("bootstrap certs", "ifabric.cli.bootstrap:certs", "An example PKI: an authority and a certificate for each part."),
    ("bootstrap etcd", "ifabric.cli.bootstrap:etcd", "Users, roles and authentication in etcd."),
    ("bootstrap nats", "ifabric.cli.natsconf:nats", "Keys for NATS, and its configuration."),
    ("audit tail", "ifabric.cli.audit:tail", "The newest records of who did what (auditors)."),
    ("audit search", "ifabric.cli.audit:search", "Find records, by who, what and when (auditors)."),
    ("audit verify", "ifabric.cli.examining:verify", "Whether the audit is as it was written (auditors)."),
    ("audit export", "ifabric.cli.audit:export", "For a SIEM or an archive: JSON lines or CEF (auditors)."),
    ("backup run", "ifabric.cli.backup:run", "Make a backup, once or again and again."),
    ("backup list", "ifabric.cli.backup:list_", "The backups there are, here and in S3."),
    ("backup verify", "ifabric.cli.backup:verify", "Read a backup to its end and say whether it can be restored."),
    ("restore", "ifabric.cli.restore:restore", "Make new etcd members and streams of a backup."),
    ("reconcile", "ifabric.cli.reconcile:reconcile", "Charge what was spent after the backup (operators)."),
    ("drill", "ifabric.cli.drill:drill", "Lose a whole cluster, restore it, and measure it."),
    ("doctor", "ifabric.cli.doctor:doctor", "What is wrong or soon will be, and what to do."),
    ("maintenance compact", "ifabric.cli.maintenance:compact", "Forget old revisions of etcd."),
    ("maintenance defrag", "ifabric.cli.maintenance:defrag", "Give space back to the disk, one member at a time."),
    ("member list", "ifabric.cli.member:list_", "The members, and how to replace one that is lost."),
    ("svc ls", "ifabric.cli.svc:ls", "The services that answer."),
    ("svc info", "ifabric.cli.svc:info", "Their endpoints."),
    ("svc stats", "ifabric.cli.svc:stats", "Their requests, errors and times."),
)
#: first words that are the program's own, and not options of `run`
OWN_FLAGS = ("--help", "-h", "--version", "--install-completion")


def build(words: Sequence[str] = ()) -> App:
    """The tree. A verb's module is imported when it is called; the one in `words` shows its own, longer help."""
    defaults = Parameter(negative=(), show_default=_default)
    app = App(
        name="ifabric",
        version=f"ifabric {__version__}",
        help=HELP,
        help_format="plaintext",
        default_parameter=defaults,
    )
    groups = {name: App(name=name, help=says) for name, says in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for name, target, says in VERBS:
        *nouns, verb = name.split()
        called = list(words[: len(nouns) + 1]) == [*nouns, verb]
        (groups[nouns[0]] if nouns else app).command(target, name=verb, help=None if called else says)
    app.register_install_completion_command()
    return app


def _default(value: Any) -> str | None:
    """Defaults that say something."""
    return None if value in (None, False, (), "") else str(value)


def run_app(arguments: Sequence[str]) -> int:
    """Parses and runs. An error is one clear sentence on stderr, and with --json its body on stdout too."""
    given = list(arguments)
    if not given or (given[0].startswith("-") and given[0] not in OWN_FLAGS):
        given.insert(0, "run")  # the default verb
    try:
        code = build(given)(given, exit_on_error=False, print_error=True, result_action="return_value")
        sys.stdout.flush()  # here, where a closed pipe can be dealt with
    except CycloptsError:
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # `ifabric ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except FabricError as error:
        return _refused(error, json=_wants_json(given))
    except Exception as error:
        if os.environ.get("IFABRIC_DEBUG"):
            raise
        kind = f"{type(error).__name__}: {error}"
        return _refused(FabricError(f"a bug in ifabric: {kind} (IFABRIC_DEBUG=1 shows where)"), json=_wants_json(given))
    return code if isinstance(code, int) else OK


def _wants_json(given: Sequence[str]) -> bool:
    """Whether `--json` was said to us: what follows `--` is said to a guest."""
    ours = given[: given.index("--")] if "--" in given else given
    return "--json" in ours


def _refused(error: FabricError, *, json: bool) -> int:
    from ifabric.cli.output import complain, print_json

    if os.environ.get("IFABRIC_DEBUG"):
        traceback.print_exc()
    complain(error)
    if json:
        print_json(error.to_body())
    if isinstance(error, ConfigError):
        return USAGE
    gone = isinstance(error, Unreachable) or (isinstance(error, Unavailable) and error.facts.get("what") == "nats")
    return UNREACHABLE if gone else FAILED
