"""Word in etcd of the last whole backup, for the daemons to tell Prometheus.

A backup is made by a process that ends; the daemons are what is watched. So what runs last, when a backup is whole, is a note of
when it was begun: a number at `vitals.BACKUP_KEY`. After a restore it says when the backup before the restored one was begun, until
the next one is made, which is true. A note that cannot be written is a warning: the backup is there all the same.
"""

from __future__ import annotations

from datetime import datetime

import grpc
from aetcd import rpc

from ifabric.store.channel import EtcdSettings, open_line
from ifabric.store.vitals import BACKUP_KEY

ASK_S = 2.0


async def note(settings: EtcdSettings, began: datetime) -> str | None:
    """Writes it; a warning when no endpoint took it."""
    why = "no endpoint is known"
    for endpoint in settings.endpoints:
        line = open_line(endpoint, settings)
        try:
            value = str(int(began.timestamp())).encode()
            await rpc.KVStub(line).Put(rpc.PutRequest(key=BACKUP_KEY, value=value), timeout=ASK_S)
        except grpc.aio.AioRpcError as error:
            why = f"{endpoint}: {error.code().name.lower()}"
            continue
        finally:
            await line.close()
        return None
    return f"the backup is there, and the daemons cannot tell so: etcd took no note of it ({why})"
