"""The chassis's messages: modules and runs of untrusted WebAssembly. One class a verb; the class names its reply.

Bytes travel as text where they are text (`stdin`, `stdout`, `stderr`) and in base64 where they are not (`stdin_b64`,
`stdout_b64`, `stderr_b64`): of each pair, at most one is set.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

from ifabric.wire.envelope import Fence, Mutation, Reply, Request, SessionId, TaskId
from ifabric.wire.governor import HoldId

#: the object store that modules are kept in, each under its own name. Without identities a client may put a whole
#: module there itself, as `uploads/...`, and name it in `put`; with them only the daemons write there.
MODULES_BUCKET = "IF_MODULES"
UPLOADS = "uploads/"
#: the daemons' own: the parts of modules that are being uploaded
UPLOADS_BUCKET = "IF_UPLOADS"
#: the largest module that the SDK sends in the message of its `put`, and the largest part that it sends of another
INLINE_MAX_BYTES = 512 * 1024
#: of one upload
PARTS_MAX = 1024
ARGS_MAX = 256
ENV_MAX = 256
ENDPOINTS_MAX = 32
#: text of one argument, one variable's name or value
WORD_MAX = 8192
#: what an output may take in one reply, whatever is configured: NATS carries a megabyte
OUTPUT_MAX_BYTES = 512 * 1024
PAGE_MAX = 1000

ModuleId = Annotated[
    str, Meta(pattern=r"^sha256:[0-9a-f]{64}$(?!\n)", description="the module's own digest", examples=["sha256:9f86…"])
]
UploadId = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)", description="chosen by the session, and its own: new for each upload"),
]
UploadName = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-]{1,64}|uploads/[A-Za-z0-9_-]{1,160})$(?!\n)")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
RunId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
EndpointName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)")]
Word = Annotated[str, Meta(max_length=WORD_MAX)]

#: limits of a run, each with the unit in its name; `limit{which}` names one of them
Limit = Literal[
    "wall_s",
    "cpu_percent",
    "memory_bytes",
    "fuel",
    "output_bytes",
    "stack_bytes",
    "table_elements",
    "tables",
    "memories",
    "instances",
    "stdin_bytes",
    "runs_per_session",
]
TrapKind = Literal[
    "unreachable",
    "memory_out_of_bounds",
    "table_out_of_bounds",
    "indirect_call_to_null",
    "bad_signature",
    "integer_overflow",
    "integer_division_by_zero",
    "bad_conversion_to_integer",
    "other",
]


class Upload(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Brings one part of a module that is too large for a message; `put` or `inspect` with the same `upload` makes the
    module of them.

    Parts come in any order, and any daemon takes them. A part that comes twice is one part. What nobody goes on with
    is forgotten after five minutes.
    """

    component: ClassVar = "chassis"
    verb: ClassVar = "upload"
    upload: UploadId
    #: its place, counted from 0
    part: Annotated[int, Meta(ge=0, lt=PARTS_MAX)]
    #: the part in base64, at least one byte
    data: str
    #: there is none after it
    last: bool = False
    #: of the whole module; with any part, and the same with each
    sha256: Sha256 | None = None


class UploadReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    upload: str
    part: int
    #: how many parts of it have come, and how many bytes they have together
    parts: int
    size: int
    #: it was there already
    again: bool = False


class Put(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Keeps a module under its digest, once it was examined and compiled. Either `wasm` or `upload` is set."""

    component: ClassVar = "chassis"
    verb: ClassVar = "put"
    #: the module in base64
    wasm: str | None = None
    #: the session's upload that has brought it; its parts are gone afterwards
    upload: UploadName | None = None


class Inspect(Request, frozen=True, kw_only=True, omit_defaults=True):
    """Says what is in a module, and why `put` would refuse it; nothing is kept or compiled. One of the three is set."""

    component: ClassVar = "chassis"
    verb: ClassVar = "inspect"
    wasm: str | None = None
    upload: UploadName | None = None
    module: ModuleId | None = None


class ModuleFacts(Reply, frozen=True, kw_only=True, omit_defaults=True):
    """A module as its own sections describe it."""

    module: str
    size: int
    #: "wasi_snapshot_preview1.fd_write"
    imports: tuple[str, ...]
    #: "_start", "memory"
    exports: tuple[str, ...]


class PutReply(ModuleFacts, frozen=True, kw_only=True, omit_defaults=True):
    #: it was there already
    again: bool = False


class InspectReply(ModuleFacts, frozen=True, kw_only=True, omit_defaults=True):
    accepted: bool
    #: every reason for which `put` would refuse it
    why: tuple[str, ...] = ()
    functions: int = 0
    tables: int = 0
    memories: int = 0
    #: of its memory, if it has one
    memory_min_bytes: int = 0
    memory_max_bytes: int | None = None
    #: bytes of each section, by name: "code", "data", "custom:name"...
    sections: dict[str, int] = {}


class Limits(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a caller may tighten, and never loosen. Absent: as configured."""

    wall_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    cpu_percent: Annotated[float, Meta(gt=0, le=100)] | None = None
    memory_bytes: Annotated[int, Meta(ge=65_536)] | None = None
    fuel: Annotated[int, Meta(ge=1, le=2**53 - 1)] | None = None
    output_bytes: Annotated[int, Meta(ge=0)] | None = None


class Run(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Runs a module in a sandbox and answers with what it wrote.

    A run with `endpoints` or a `hold` has effects: with a `request_id` it is carried out at most once, and a retry
    gets the first answer. Any other run may be repeated by a retry.
    """

    component: ClassVar = "chassis"
    verb: ClassVar = "run"
    module: ModuleId
    #: the exported function to call; it takes nothing and returns nothing
    entry: Annotated[str, Meta(min_length=1, max_length=256)] = "_start"
    args: Annotated[tuple[Word, ...], Meta(max_length=ARGS_MAX)] = ()
    env: Annotated[dict[Annotated[str, Meta(min_length=1, max_length=WORD_MAX)], Word], Meta(max_length=ENV_MAX)] = {}
    stdin: str | None = None
    stdin_b64: str | None = None
    limits: Limits = Limits()
    #: names from the configuration that `ifabric.http` may be called with
    endpoints: Annotated[tuple[EndpointName, ...], Meta(max_length=ENDPOINTS_MAX)] = ()
    #: the claim that it is for: the run ends when that is lost
    task: TaskId | None = None
    fence: Fence | None = None
    #: the session's open hold that is committed with what the run cost, however it ends
    hold: HoldId | None = None


class RunUsage(Struct, frozen=True, kw_only=True):
    """What a run took."""

    wall_s: float
    cpu_s: float
    fuel: int
    #: the largest that its memory was; its limit, when the module does not export its memory
    memory_peak_bytes: int
    stdout_bytes: int
    egress_bytes: int
    egress_calls: int
    #: at the configured prices
    cost_micro_usd: int = 0


class RunReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    run: str
    exit_code: int
    stdout: str = ""
    stdout_b64: str | None = None
    stderr: str = ""
    stderr_b64: str | None = None
    #: something it wrote did not fit into `output_bytes`
    truncated: bool = False
    usage: RunUsage


class Modules(Request, frozen=True, kw_only=True, omit_defaults=True):
    """A page of the modules that are kept, in the order of their names."""

    component: ClassVar = "chassis"
    verb: ClassVar = "modules"
    limit: Annotated[int, Meta(ge=1, le=PAGE_MAX)] = 100
    after: ModuleId | None = None


class ModuleLine(Struct, frozen=True, kw_only=True, omit_defaults=True):
    module: str
    size: int
    #: RFC 3339
    at: str


class ModulesReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    modules: tuple[ModuleLine, ...]
    after: str | None = None


class Runs(Request, frozen=True, kw_only=True, omit_defaults=True):
    """The runs that have lasted longer than a second, on all daemons; and how this daemon's workers are."""

    component: ClassVar = "chassis"
    verb: ClassVar = "runs"


class RunLine(Struct, frozen=True, kw_only=True, omit_defaults=True):
    run: str
    session: str
    module: str
    #: RFC 3339
    since: str
    age_s: float
    wall_left_s: float
    task: str | None = None
    #: the daemon that it runs on
    daemon: str = ""


class Pool(Struct, frozen=True, kw_only=True):
    """One daemon's workers."""

    workers: int
    idle: int
    busy: int
    queued: int
    max: int


class Slo(Struct, frozen=True, kw_only=True):
    """One daemon's service level over the rolling window."""

    window_s: float
    runs: int
    latency_p95_ms: float
    target_latency_p95_ms: float
    availability_percent: float
    target_availability_percent: float
    #: of what may fail (or be slow) within the window, how much has not: 1 untouched, below 0 overdrawn
    error_budget_left: float


class RunsReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    runs: tuple[RunLine, ...]
    pool: Pool
    slo: Slo


class Kill(Mutation, frozen=True, kw_only=True, omit_defaults=True):
    """Ends a run, on whichever daemon it is: its caller is told `killed`."""

    component: ClassVar = "chassis"
    verb: ClassVar = "kill"
    admin: ClassVar = True
    run: RunId
    why: Annotated[str, Meta(max_length=256)] = ""


class KillReply(Reply, frozen=True, kw_only=True, omit_defaults=True):
    run: str
    session: SessionId


class ViolationEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A guest tried what it may not: containment held."""

    event: str
    at: str
    run: str
    session: str
    module: str
    #: a trap's kind, `limit` and which, or `egress` and why
    kind: str
    message: str
    task: str | None = None
    daemon: str = ""


class SloEvent(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A daemon's service level fell short of its target, or is met again."""

    event: str
    at: str
    #: "latency" or "availability"
    which: str
    met: bool
    value: float
    target: float
    daemon: str = ""


ChassisEvent = ViolationEvent | SloEvent
REPLIES: dict[type[Request], type[Reply]] = {
    Upload: UploadReply,
    Put: PutReply,
    Inspect: InspectReply,
    Run: RunReply,
    Modules: ModulesReply,
    Runs: RunsReply,
    Kill: KillReply,
}
EVENTS: dict[str, type[Struct]] = {"violation": ViolationEvent, "slo": SloEvent}

for _request, _reply in REPLIES.items():
    _request.reply = _reply
