"""`ifabric maintenance compact` and `defrag`."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from ifabric.cli.cluster import Servers, nats_settings
from ifabric.cli.options import Json
from ifabric.cli.output import err, out, plain, print_json, print_table
from ifabric.errors import ConfigError, FabricError, Unavailable, Unreachable

if TYPE_CHECKING:
    from ifabric.care.cluster import Cluster
    from ifabric.care.facts import Etcd, Member
    from ifabric.care.places import Places

#: a member that was away for its defragmentation is given so long to be well again
WELL_AGAIN_S = 30.0
LOOK_EVERY_S = 0.2
#: of the quota: above it (etcd's mixin calls that critical) the next writes would raise the alarm again
ROOM_UP_TO = 0.95


def compact(
    where: Servers | None = None,
    *,
    keep: Annotated[
        str | None,
        Parameter(help="How much history to keep: 0s, 90s, 10m, 2h, 1d. Default: 10m. The journal says when that was."),
    ] = None,
    revision: Annotated[
        int | None, Parameter(help="Or: forget what is before this revision.", validator=Number(gte=1))
    ] = None,
    json: Json = False,
) -> int:
    """Forget old revisions of etcd's keys. What the keys are now is kept.

    The file does not get smaller by that: its pages are free for what comes.
    `ifabric maintenance defrag` gives them back to the disk.

    A watcher that is further behind than what is kept reads everything again;
    nobody else notices.

    For example:

        ifabric maintenance compact --config fabric.yaml
        ifabric maintenance compact --keep 0s
        ifabric maintenance compact --revision 1234567
    """
    import uvloop

    from ifabric.care.cluster import Cluster
    from ifabric.care.maintaining import seconds
    from ifabric.clock import SystemClock

    if keep is not None and revision is not None:
        raise ConfigError("--keep and --revision: give one of them")
    keep_s = seconds(keep or "10m")
    places, clock = (where or Servers()).places(), SystemClock()

    async def run() -> dict[str, Any]:
        async with Cluster(places.etcd, clock) as cluster:
            before = await _looked(cluster)
            through = before.leader if before.leader in before.answering else before.answering[0]
            assert through is not None, "somebody answers"
            now = max(member.revision for member in before.answering)
            upto = revision
            if upto is None:
                upto = now if keep_s == 0 else await _revision_then(places, keep_s)
            if upto is None:
                return {"revision": None, "now": now}
            if upto > now:
                raise ConfigError(f"--revision: etcd is at {now}; {upto} is still to come. Nothing was compacted.")
            await cluster.compact(through, upto)
            after = await cluster.status(through)
            return {
                "revision": upto,
                "now": now,
                "freed_bytes": max(0, through.used_bytes - after.used_bytes),
                "size_bytes": after.size_bytes,
                "used_bytes": after.used_bytes,
            }

    done = uvloop.run(run())
    if json:
        print_json(done)
    elif done["revision"] is None:
        out.print(f"[green]✔[/] nothing to forget: the journal has no event older than {keep or '10m'}")
    else:
        from ifabric.care.finding import size

        out.print(
            f"[green]✔[/] forgotten: what is before revision {done['revision']} (it is at {done['now']} now); "
            f"{size(done['freed_bytes'])} freed within the file, {size(done['used_bytes'])} of {size(done['size_bytes'])} in use"
        )
    return 0


def defrag(
    where: Servers | None = None,
    *,
    member: Annotated[
        tuple[str, ...], Parameter(negative="", help="Only this one, by name, id or URL; may be given several times.")
    ] = (),
    yes: Annotated[bool, Parameter(help="Do it; without, what would be done is shown.")] = False,
    force: Annotated[
        bool, Parameter(help="Also while so few members are well that one away may stop the cluster.")
    ] = False,
    disarm: Annotated[
        bool, Parameter(help="Afterwards take NOSPACE alarms away, if every member has room again.")
    ] = False,
    json: Json = False,
) -> int:
    """Give free pages of etcd's files back to the disk, one member at a time.

    A member answers nothing while its file is written anew. So the followers
    come first and the leader last; the leadership is handed over before when
    that took long; the cluster has to be well before each, and the first that
    is not ends it. The daemons need no stop.

    Exit 0 when all was done, 1 when it ended early, 2 without --yes.

    For example:

        ifabric maintenance defrag --config fabric.yaml
        ifabric maintenance defrag --config fabric.yaml --yes
        ifabric maintenance defrag --yes --disarm
    """
    import uvloop

    from ifabric.care.cluster import Cluster
    from ifabric.care.maintaining import order
    from ifabric.clock import SystemClock

    places = (where or Servers()).places()

    async def run() -> int:
        async with Cluster(places.etcd, SystemClock()) as cluster:
            etcd = await _looked(cluster)
            turns = order(etcd, member)
            if not yes:
                _show_plan(etcd, turns, json=json)
                return 2
            work = _Defragmenting(cluster, force=force)
            stopped = await work.run(turns)
            disarmed = None if stopped or not disarm else await work.disarm()
            if json:
                print_json({"done": work.done, "stopped": stopped, "disarmed": disarmed})
            return _say_end(stopped, disarmed)

    code: int = uvloop.run(run())
    return code


class _Defragmenting:
    """One member after the other."""

    def __init__(self, cluster: Cluster, *, force: bool) -> None:
        self._cluster = cluster
        self._force = force
        self._longest_s = 0.0
        self.done: list[dict[str, Any]] = []

    async def run(self, turns: list[Member]) -> str | None:
        """Why it ended before all had their turn; None: it did not."""
        for number, turn in enumerate(turns, start=1):
            etcd = await self._well_again(turn)
            if isinstance(etcd, str):
                return f"{etcd}; {turn.called} was not defragmented"
            _progress(f"{number} of {len(turns)}: {turn.called}")
            try:
                await self._step_down(etcd, turn)
                took_s = await self._cluster.defragment(turn)
            except FabricError as error:
                return f"{turn.called}: {error.message}"
            finally:
                _progress("")
            self._longest_s = max(self._longest_s, took_s)
            self._tell(turn, await self._cluster.status(turn), took_s)
        return None

    async def _well_again(self, turn: Member) -> Etcd | str:
        """The cluster, once it is well; or why it is not."""
        from ifabric.care.maintaining import why_not
        from ifabric.clock import monotonic

        until = monotonic() + (WELL_AGAIN_S if self.done else 0.0)  # before the first nobody was hurt by us
        while True:
            etcd = await self._cluster.look()
            now = next((one for one in etcd.members if one.id == turn.id), turn)
            reason = f"it does not answer ({now.error})" if now.error else None
            if reason is None and not self._force:
                reason = why_not(etcd, now)
            if reason is None:
                return etcd
            if monotonic() >= until:
                return reason
            await asyncio.sleep(LOOK_EVERY_S)

    async def _step_down(self, etcd: Etcd, turn: Member) -> None:
        from ifabric.care.maintaining import HURTS_FROM_S, successor

        leader = etcd.leader
        if leader is None or leader.id != turn.id or len(etcd.members) == 1 or self._longest_s < HURTS_FROM_S:
            return
        heir = successor(etcd, leader)
        await self._cluster.move_leader(leader, heir)
        err.print(f"{plain(heir.called)} leads now, in place of {plain(leader.called)}")

    def _tell(self, before: Member, after: Member, took_s: float) -> None:
        from ifabric.care.finding import size

        freed = before.size_bytes - after.size_bytes
        self.done.append(
            {
                "member": before.called,
                "before_bytes": before.size_bytes,
                "after_bytes": after.size_bytes,
                "freed_bytes": freed,
                "took_s": round(took_s, 3),
            }
        )
        err.print(
            f"[green]✔[/] {plain(before.called)}: {size(before.size_bytes)} -> {size(after.size_bytes)}, "
            f"{size(max(0, freed))} freed, in {took_s:.2f} s"
        )

    async def disarm(self) -> int | str:
        """How many NOSPACE alarms were taken away; or why none was."""
        etcd = await self._cluster.look()
        for member in etcd.members:
            if member.error:
                return f"{member.called} does not answer ({member.error}): whether it has room is not known"
            if member.quota_bytes and member.size_bytes >= ROOM_UP_TO * member.quota_bytes:
                return f"{member.called} has no room yet: purge what is done, or raise --quota-backend-bytes"
        through = etcd.leader or etcd.answering[0]
        return await self._cluster.disarm(through)


def _say_end(stopped: str | None, disarmed: int | str | None) -> int:
    if stopped:
        err.print(f"[red]✘[/] ended: {plain(stopped)}")
        return 1
    if isinstance(disarmed, str):
        err.print(f"[red]✘[/] the alarm stays: {plain(disarmed)}")
        return 1
    if disarmed is not None:
        err.print(f"[green]✔[/] {disarmed} NOSPACE alarm(s) taken away")
    return 0


def _show_plan(etcd: Etcd, turns: list[Member], *, json: bool) -> None:
    from ifabric.care.finding import size
    from ifabric.care.maintaining import why_not

    reason = why_not(etcd)
    if json:
        print_json({"order": [one.called for one in turns], "refused": reason})
        return
    rows = [(one.called, size(one.size_bytes), size(one.size_bytes - one.used_bytes), one.error or "") for one in turns]
    print_table(("MEMBER, IN THIS ORDER", "FILE", "FREE WITHIN", ""), rows)
    if reason:
        out.print(f"[yellow]![/] it would be refused: {plain(reason)}")
    err.print("nothing was done; --yes does it")


def _progress(text: str) -> None:
    """On a terminal, on a line that is written over."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


async def _looked(cluster: Cluster) -> Etcd:
    etcd = await cluster.look()
    if not etcd.answering:
        raise Unreachable(
            f"no member of etcd answers: {'; '.join(f'{one.called}: {one.error}' for one in etcd.members)}"
        )
    return etcd


async def _revision_then(places: Places, keep_s: float) -> int | None:
    """By the journal. `Unavailable` says what else could be done."""
    from ifabric.bus.nats import Nats
    from ifabric.care.revisions import revision_at
    from ifabric.clock import SystemClock

    clock = SystemClock()
    bus = Nats(nats_settings(places), clock)
    try:
        await bus.connect()
        return await revision_at(bus, clock.wall_ms() / 1000 - keep_s)
    except FabricError as error:
        raise Unavailable(
            f"which revision that was, only the journal knows, and it cannot be read: {error.message}. Nothing was compacted. "
            "Give --revision, or --keep 0s.",
            what="jetstream",
        ) from None
    finally:
        await bus.close()
