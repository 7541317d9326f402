"""Finds an actor's class by a name in the configuration: an installed one ("coordinator"), or "module:Class".

Only the absence of what was named is the configuration's fault and becomes a `ConfigError`. An actor's module that is
there and fails to import is a bug in it, and raises as it is, with its traceback.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from ifabric.actor.base import Actor
from ifabric.errors import ConfigError

GROUP = "ifabric.actors"


def known() -> dict[str, str]:
    """The installed actors: name -> "module:Class"."""
    return {entry.name: entry.value for entry in sorted(entry_points(group=GROUP))}


def load(name: str) -> type[Actor]:
    """The class. `ConfigError` says what is wrong with the name, or with what stands behind it."""
    if ":" in name:
        return _resolve(name, name)
    installed = known()
    if name in installed:
        return _resolve(name, installed[name])
    close = difflib.get_close_matches(name, installed, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ConfigError(
        f"actors: there is no actor {name!r}{hint} Installed are: {', '.join(installed) or 'none'}. "
        "One that is not installed is named as module:Class."
    )


def _resolve(name: str, target: str) -> type[Actor]:
    module_name, _, attribute = target.partition(":")
    if not (all(part.isidentifier() for part in module_name.split(".")) and attribute.isidentifier()):
        raise ConfigError(f"actors: {name!r} is not of the form module:Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there; something that it imports is not
        raise ConfigError(f"actors: there is no module {error.name!r}, which {name!r} needs") from None
    found = getattr(module, attribute, None)
    if found is None:
        raise ConfigError(f"actors: module {module_name!r} has no {attribute!r}, which {name!r} needs")
    if not (isinstance(found, type) and issubclass(found, Actor)):
        raise ConfigError(f"actors: {name!r} is not an actor: {target} is not a subclass of ifabric.actor.base.Actor")
    return found
