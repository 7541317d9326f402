"""Finds an actor's class by a name in the configuration: an installed one ("coordinator"), or "module:Class"."""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from ifabric.actor.base import Actor
from ifabric.errors import ConfigError

GROUP = "ifabric.actors"


def known() -> list[str]:
    """The names of the installed actors."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load(name: str) -> type[Actor]:
    """The class. `ConfigError` says what is wrong with the name, or with what stands behind it."""
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
                raise  # the module is there; something that it imports is not
            raise ConfigError(f"actors: there is no module {module_name!r} (in {name!r})") from None
        found = getattr(module, attribute, None)
        if found is None:
            raise ConfigError(f"actors: module {module_name!r} has no {attribute!r}")
    else:
        matching = [entry for entry in entry_points(group=GROUP) if entry.name == name]
        if not matching:
            close = difflib.get_close_matches(name, known(), 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; installed are {', '.join(known()) or 'none'}"
            raise ConfigError(f"actors: there is no actor {name!r}{hint}")
        found = matching[0].load()
    if not (isinstance(found, type) and issubclass(found, Actor)):
        raise ConfigError(f"actors: {name!r} is not a class of actors (a subclass of ifabric.actor.base.Actor)")
    return found
