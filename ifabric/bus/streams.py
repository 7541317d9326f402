"""Streams as they are configured: made when they are absent, brought up to date when they differ.

A stream is looked for before it is added: JetStream reserves the `max_bytes` of what it is asked to add before it sees
that it is there already, and then refuses with "insufficient storage resources" where twice as much is not free.
"""

from __future__ import annotations

from collections.abc import Iterable

import nats.js.api as js
import nats.js.errors
from nats.js import JetStreamContext

from ifabric.cancellation import heard


async def made(context: JetStreamContext, config: js.StreamConfig, kept_up: Iterable[str]) -> js.StreamInfo:
    """The stream, which is as `config` says in the fields named `kept_up`. Raises what nats-py raises."""
    try:
        found = await heard(context.stream_info(config.name))
    except nats.js.errors.NotFoundError:
        try:
            return await heard(context.add_stream(config))
        except nats.js.errors.APIError as refused:
            try:  # somebody else may have made it just now
                found = await heard(context.stream_info(config.name))
            except nats.js.errors.NotFoundError:
                raise refused from None
    if all(getattr(found.config, name) == getattr(config, name) for name in kept_up):
        return found
    return await heard(context.update_stream(config))
