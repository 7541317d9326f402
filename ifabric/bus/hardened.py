"""A connection that no message of a stranger can break.

The server passes subjects, reply subjects and headers on as it got them, whatever bytes they are, and does not check
who owns a reply subject. nats-py 2.16 trusts them, and an exception in its read loop ends the loop: the daemon is deaf
until its own pings go unanswered, three seconds for one message. What got through, each by one message of any agent:

- a subject or a reply subject that is not UTF-8, and a header block shorter than its first line, or with a status that
  is not UTF-8: exceptions in the read loop;
- a vertical tab or a form feed in a subject: the server takes them for part of a name and nats-py for a space, so the
  message arrives at another subscription, or the connection breaks.

So here names are read as the server reads them, broken headers count as none, and what still fails is reported and
costs only its own message. `tests/actors/test_hostile.py` sends all of it.
"""

from __future__ import annotations

import re
from typing import Any

import nats.protocol.parser
from nats.aio.client import Client

#: nats-py's own, but for `\s` and `\S`: the server parts its words with spaces alone
_WORD, _GAP = rb"([^ \t\r\n]+)", rb"[ \t]+"
_HEAD = _GAP + _WORD + _GAP + rb"(\d+)" + _GAP + rb"(" + _WORD + _GAP + rb")?"
nats.protocol.parser.MSG_RE = re.compile(rb"\AMSG" + _HEAD + rb"(\d+)\r\n")
nats.protocol.parser.HMSG_RE = re.compile(rb"\AHMSG" + _HEAD + rb"(\d+)" + _GAP + rb"(\d+)\r\n")


class HardenedClient(Client):  # type: ignore[misc]
    """nats-py's client, reading what strangers send with care."""

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        if not self.is_connected:
            # what waits would be written to a transport that has gone, and end the closing half done
            self._pending: list[bytes] = []
            self._pending_data_size = 0
        await super()._close(status, do_cbs)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        try:
            await super()._process_msg(sid, subject, reply, data, headers)
        except Exception as error:
            await self._error_cb(error)

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        if not headers:
            return None
        try:
            found: dict[str, str] | None = await super()._process_headers(headers)
        except (IndexError, UnicodeDecodeError) as error:
            await self._error_cb(error)
            return None
        return found

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Any:
        return self.msg_class(
            subject=subject.decode("utf-8", "replace"),
            reply=reply.decode("utf-8", "replace"),
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )
