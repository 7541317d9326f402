"""What the facts mean, how bad it is, and what to do. Pure: every threshold is here, with where it comes from.

A finding that says `ok` is there so that a part that is well is seen to have been looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from msgspec import Struct

from ifabric.care import findings_daemon, findings_etcd, findings_nats
from ifabric.care.facts import Backups, Certificate, Facts, Offset, Vault
from ifabric.care.finding import Finding, critical, days, ok, span, warning

__all__ = ["CLOCK", "Finding", "judge"]

#: Let's Encrypt renews with a third of 90 days left; etcd's mixin calls it a warning with seven days left, at which we
#: assume that nobody renews by himself
CERTIFICATE_WARNING_DAYS, CERTIFICATE_CRITICAL_DAYS = 30.0, 7.0
#: etcd complains of a peer's clock from one second on (rafthttp: "prober found high clock drift"). Leases and claims run on
#: monotonic clocks and do not suffer; budgets' days and months, events' times and certificates do. Five minutes is what our
#: own certificates allow for (`pki.SKEW`).
CLOCK_WARNING_S, CLOCK_CRITICAL_S = 1.0, 300.0
#: a token that ends within the hour ends before anybody reads this
TOKEN_WARNING_S = 3600.0
#: of `backup.interval_seconds`: as its documentation says
BACKUP_INTERVALS_MAX = 3
PARTS = ("etcd", "NATS", "daemon", "clocks", "certificates", "Vault", "backups", "configuration")
CLOCK = "clocks"


class Report(Struct, frozen=True, kw_only=True):
    """All findings, in the order of the parts, the worst of a part first."""

    findings: tuple[Finding, ...]
    #: whether anything that was asked has answered
    reached: bool

    def worst(self) -> Literal["ok", "warning", "critical"]:
        """Of all of them."""
        found = {finding.severity for finding in self.findings}
        return "critical" if "critical" in found else "warning" if "warning" in found else "ok"


def judge(facts: Facts) -> Report:
    """The opinion."""
    found = [
        *findings_etcd.judge(facts),
        *findings_nats.judge(facts),
        *findings_daemon.judge(facts),
        *_clocks(facts),
        *_certificates(facts.certificates),
        *_vaults(facts.vaults),
        *_backups(facts.backups, facts),
        *(warning("configuration", smell, do="change it, and `ifabric check-config` it") for smell in facts.smells),
        *(warning(missed.part, f"could not be looked at: {missed.why}") for missed in facts.missed),
    ]
    rank = {"critical": 0, "warning": 1, "ok": 2}
    found.sort(key=lambda finding: (PARTS.index(finding.part), rank[finding.severity]))
    etcd, nats, daemon = facts.etcd, facts.nats, facts.daemon
    reached = bool(
        (etcd is not None and etcd.answering)
        or (nats is not None and nats.answering)
        or (daemon is not None and not daemon.error)
    )
    return Report(findings=tuple(found), reached=reached)


def _clocks(facts: Facts) -> Iterator[Finding]:
    held: list[tuple[str, Offset]] = []
    if facts.etcd is not None:
        held += [(member.called, member.clock) for member in facts.etcd.members if member.clock is not None]
    if facts.nats is not None:
        held += [(server.name or server.url, server.clock) for server in facts.nats.servers if server.clock is not None]
        asked = {name for name, _ in held}
        leaders = {stream.leader: stream.clock for stream in facts.nats.streams if stream.clock is not None}
        held += [(name, clock) for name, clock in leaders.items() if name not in asked]
    good = []
    for name, clock in held:
        off = clock.surely_s
        if abs(off) < CLOCK_WARNING_S:
            good.append(clock)
            continue
        made = critical if abs(off) >= CLOCK_CRITICAL_S else warning
        yield made(
            CLOCK,
            f"the clock of {name} is {'ahead of' if off > 0 else 'behind'} this machine's",
            figure=f"{span(abs(off))} at the least",
            do="`chronyc tracking` on both machines: one of them is not synchronised",
        )
    if good:
        grain = max(clock.most_s - clock.least_s for clock in good)
        yield ok(CLOCK, f"{len(good)} of {len(held)} agree with this machine's", figure=f"to within {grain:.1f} s")


def _certificates(found: tuple[Certificate, ...]) -> Iterator[Finding]:
    part = "certificates"
    renew = "renew it (`ifabric bootstrap certs` shows how ours are made); files are read again on SIGHUP or a restart"
    for one in found:
        what = f"{one.where} ({one.name})" if one.name else one.where
        if one.error:
            yield critical(part, f"{one.where}: {one.error}", do="put it there, readable for the daemon")
        elif one.days_to_begin > 0:
            yield critical(
                part, f"{what} is not valid yet", figure=f"from {days(one.days_to_begin)} on", do="see the clocks"
            )
        elif one.days_left <= 0:
            yield critical(part, f"{what} has expired", figure=f"{days(-one.days_left)} ago", do=renew, playbook=part)
        elif one.days_left < CERTIFICATE_WARNING_DAYS:
            made = critical if one.days_left < CERTIFICATE_CRITICAL_DAYS else warning
            yield made(part, f"{what} expires", figure=f"in {days(one.days_left)}", do=renew, playbook=part)
        if one.key_is_open:
            yield warning(
                part, f"the key of {what} can be read by others", do=f"chmod go= {one.where.removesuffix('.crt')}.key"
            )
    good = [one.days_left for one in found if not one.error and one.days_left >= CERTIFICATE_WARNING_DAYS]
    if good:
        yield ok(part, f"{len(good)} of {len(found)} are valid for long", figure=f"{days(min(good))} at the least")


def _vaults(vaults: tuple[Vault, ...]) -> Iterator[Finding]:
    means: dict[int, tuple[Callable[..., Finding], str, str]] = {
        429: (ok, "answers, as a standby", ""),
        472: (warning, "is a disaster-recovery secondary: it gives no secrets", "give the address of the primary"),
        473: (ok, "answers, as a performance standby", ""),
        501: (critical, "is not initialised", "vault operator init"),
        503: (critical, "is sealed", "vault operator unseal, with as many keys as it asks for"),
    }
    for vault in vaults:
        called = f"{vault.where} {vault.address}"
        if vault.error or vault.status is None:
            yield critical(
                "Vault",
                f"{called} does not answer: {vault.error}",
                do="sandboxes with credentials fail until it does",
                playbook="degraded",
            )
            continue
        made, says, do = means.get(vault.status, (ok, "answers", ""))
        if vault.status >= 500 and vault.status not in means:
            made, says = critical, f"answers {vault.status}"
        yield made("Vault", f"{called} {says}", do=do, playbook="degraded" if made is not ok else "")
        if vault.status in (501, 503):
            continue
        if vault.token_error:
            yield critical(
                "Vault", f"{called}: the token is of no use: {vault.token_error}", do="write a fresh one to its file"
            )
        elif vault.token_ttl_s is not None and 0 < vault.token_ttl_s < TOKEN_WARNING_S:
            yield warning(
                "Vault",
                f"{called}: the token ends",
                figure=f"in {span(vault.token_ttl_s)}",
                do="see that whoever keeps its file fresh (a Vault agent) runs",
            )


def _backups(found: Backups | None, facts: Facts) -> Iterator[Finding]:
    if found is None:
        return
    run = f"ifabric backup run{facts.words}"
    if not found.wanted:
        if not facts.embedded:
            yield warning(
                "backups",
                "none are made: backup.recipients is empty",
                do=f"name an age public key there; then `{run} --every {found.interval_s:.0f}`",
            )
        return
    for name in found.broken:
        yield warning(
            "backups",
            f"{name} is not whole, or its facts are missing",
            do=f"ifabric backup verify {found.folder}/{name}",
        )
    if found.error:
        yield critical("backups", f"{found.folder}: {found.error}", do=f"make it readable, or `{run}`")
    elif found.newest_age_s is None:
        yield critical("backups", f"there is none in {found.folder}", do=run, playbook="backup-age")
    elif found.newest_age_s > BACKUP_INTERVALS_MAX * found.interval_s:
        yield warning(
            "backups",
            f"the newest is old: {found.newest}",
            figure=f"{span(found.newest_age_s)}; every {span(found.interval_s)} is wanted",
            do=f"see why `{run} --every` does not run; make one now: `{run}`",
            playbook="backup-age",
        )
    else:
        yield ok("backups", f"the newest is {found.newest}", figure=f"{span(found.newest_age_s)} old")
