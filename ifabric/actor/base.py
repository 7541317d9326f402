"""What an actor is.

An actor owns one component's verbs. Its handlers are methods marked `@handles`; the annotation of the message is the wire
schema, so the table of handlers *is* the decoder. Handlers run concurrently on one event loop: between two `await`s nobody
else runs, so a decision made there needs no lock.

**The lifecycle.** `start` rebuilds everything from the store; when it returns the actor is ready. `stop` is called once,
after the last message was taken, and ends what the actor spawned. Both tolerate being called twice, `stop` without `start`,
and being cancelled. An instance is never started again: a restart makes a new one.

**Failing.** A `FabricError` from a handler is an answer. Any other exception is a bug: the caller is told `internal`, it is
logged and counted, and the actor goes on, because one poisonous message must not take the others' actor down. Two things crash
the actor, and its supervisor starts a new one from the store: a failed `assert` (its state is not to be trusted), and the end of
a task it spawned. Requests in flight then are answered `unavailable`; whether they were carried out is found by a retry.
"""
