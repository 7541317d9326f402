"""The identity component: who may speak to the fabric, and as whom.

It hosts the operators' verbs, and the gate that NATS asks. What it believes is in `rules`; what each role may say is
one table, `ifabric.wire.permissions`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ifabric.actor.base import Actor, Caller, Context, handles
from ifabric.actor.receipts import Receipts
from ifabric.clock import rfc3339
from ifabric.errors import FabricError, StartupError
from ifabric.wire import identity as wire
from ifabric_actors.identity import rules
from ifabric_actors.identity.gate import AGAIN_S, Gate
from ifabric_actors.identity.records import Agent
from ifabric_actors.identity.register import Message, Register, there_is


class Identity(Actor):
    """Agents, operators, and the gate of NATS."""

    component = "identity"
    description = "Says who may connect, and ends those who may no more."

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        system = context.system
        if system is None:
            raise StartupError("the identity actor needs identity.issuer_seed_file and identity.system_seed_file")
        self._receipts = Receipts(context.store, context.clock, keep_s=context.settings.coordinator.receipt_ttl_seconds)
        self._register = Register(context, self._receipts)
        self._gate = Gate(context, system.bus, self._register, system.issuer_seed)
        self._changed: dict[str, Agent] = {}

    async def start(self) -> None:
        await self._gate.open()
        self.spawn(self._sweep(), name="sweep")

    async def stop(self) -> None:
        await super().stop()
        await self._gate.close()
        await self._receipts.stop()

    # -- verbs -------------------------------------------------------------------------------------------------------

    @handles
    async def whoami(self, message: wire.Whoami, caller: Caller) -> wire.AgentReply:
        key = self.context.config.operators.get(caller.session)
        if key is not None:
            return wire.AgentReply(agent=caller.session, role="operator", public_key=key, by="the configuration")
        return _reply(caller.session, there_is(caller.session, await self._register.get(caller.session)))

    @handles
    async def create(self, message: wire.CreateAgent, caller: Caller) -> Any:
        return await self._change(
            message, caller, lambda there: rules.created(message, there, caller.session, self._now())
        )

    @handles
    async def rotate(self, message: wire.RotateAgent, caller: Caller) -> Any:
        return await self._change(
            message,
            caller,
            lambda there: rules.rotated(message, there_is(message.agent, there), caller.session, self._now()),
        )

    @handles
    async def revoke(self, message: wire.RevokeAgent, caller: Caller) -> Any:
        return await self._change(
            message,
            caller,
            lambda there: rules.revoked(message, there_is(message.agent, there), caller.session, self._now()),
        )

    @handles
    async def list(self, message: wire.ListAgents, caller: Caller) -> wire.AgentsReply:
        found = await self._register.page(message.after, message.limit)
        more = len(found) == message.limit
        return wire.AgentsReply(
            agents=tuple(_reply(name, agent) for name, agent in found), after=found[-1][0] if more else None
        )

    # -- how they are carried out ------------------------------------------------------------------------------------

    async def _change(self, message: Message, caller: Caller, decide: Callable[[Agent | None], Agent]) -> Any:
        rules.refuse_configured(message.agent, self.context.config.operators)
        before, reply = await self._register.change(message, caller, decide, lambda agent: _reply(message.agent, agent))
        self.context.log.info("an agent was changed", verb=message.verb, agent=message.agent, by=caller.session)
        if before is not None:
            await self._end(message.agent, before)
            self._changed[message.agent] = before
        return reply

    async def _end(self, name: str, before: Agent) -> None:
        """Ends what is not as the record says. What cannot be done now, the sweep does."""
        try:
            await self._gate.end(name, before)
        except FabricError as error:
            self.context.log.warning("connections are ended later", agent=name, why=error.message)

    async def _sweep(self) -> None:
        clock, every_s = self.context.clock, self.context.config.sweep_seconds
        due = clock.monotonic() + every_s
        while True:
            await clock.sleep(min(AGAIN_S, every_s))
            changed, self._changed = self._changed, {}
            for name, before in changed.items():  # one that was let in while its record changed is there by now
                await self._end(name, before)
            if clock.monotonic() >= due:
                due = clock.monotonic() + every_s
                try:
                    await self._gate.sweep()
                except FabricError as error:
                    self.context.log.warning("connections could not be looked through", why=error.message)

    def _now(self) -> int:
        return self.context.clock.wall_ms()


def _reply(name: str, agent: Agent) -> wire.AgentReply:
    return wire.AgentReply(
        agent=name,
        role=agent.role,
        public_key=agent.public_key,
        account=agent.account,
        capabilities=agent.capabilities,
        state="revoked" if agent.revoked_at else "active",
        by=agent.by,
        at=rfc3339(agent.at),
        note=agent.note,
        former_until=rfc3339(agent.former_until) if agent.former_until else None,
    )
