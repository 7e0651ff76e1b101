"""What a supervisor and its ranks say to each other; expertd.wire frames it.

A supervisor says Setup (first, once), Begin (once per epoch), Submit, Observe and Cancel. A rank says Loading... and
Ready (once), Joined and Ended (each at most once per epoch) and Fatal (last); as leader also Choice and Stats, and per
request Started, Token..., and one of Done, Rejected (the request is wrong) and Failed (we are, or lead no more).
"""

from dataclasses import dataclass, field
from typing import Any

from expertd.dialect import Dialect
from expertd.sampling import Sampling
from expertd.wire import Codec

# A request carries a prompt; 64 MiB is far above any context length and far below any memory.
MAX_FRAME_BYTES = 64 << 20


@dataclass(frozen=True)
class Setup:
    """The first frame to each rank: which one it is on its host, and what it serves. `group` is GroupConfig as a map.

    Every epoch's mailbox comes over the socket `fd_channel`, as a descriptor beside the epoch's number in 8 bytes,
    big-endian.
    """

    rank: int
    lifeline_fd: int
    fd_channel: int
    group: dict[str, Any]


@dataclass(frozen=True)
class Begin:
    """A new epoch, in which the receiver is `rank` of as many ranks as there are `fractions` (they add up to 1).

    The one before it is over, whatever the rank knew of it; `reason` says why, for people. `address` and
    `interface` are this host's end of the way to the host before it, "" when all ranks are on one host.
    """

    epoch: int
    rank: int
    split: str
    fractions: tuple[float, ...]
    reason: str
    address: str = ""
    interface: str = ""

    @property
    def num_ranks(self) -> int:
        return len(self.fractions)


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like: `text` is a JSON schema, a regular expression or a grammar in Lark's syntax, as
    `kind` says ("json_schema", "regex" or "lark"); `param` is the name by which the client gave it, for errors."""

    kind: str
    text: str
    param: str


@dataclass(frozen=True)
class Submit:
    """One request; exactly one of `prompt` (raw text), `messages` (for the chat template) and `prompt_ids` is given.

    The answer ends with one of the checkpoint's end tokens (not if `ignore_end`) or of `stop_ids`, neither of which is
    in the text, before one of the strings of `stop`, or with `max_tokens`. Before `min_tokens` are there, end and stop
    tokens are never chosen and stop strings are not looked for. `logprobs` 0 to 20 asks for the log-probability of each
    token and as many of the likeliest. `logits_file` asks rank 0 to write the float32 logits of every generated
    position there, as safetensors: "logits" [num_tokens, vocab].

    A request that was accepted before, by a leader that is gone, is `resumed`, and `generated` are the tokens that its
    client has: the answer goes on after them, and only new ones are sent. `keep` and `note` are the supervisors': the
    request goes on without a reader and may be read again; the note is the server's, for then.

    `tools` and `template_args` go to the chat template. `echo` asks for the prompt in Started, `prompt_logprobs` 0 to
    20 also for the log-probability of each of its tokens; with `max_tokens` 0 that is all. `grammar` bounds the answer,
    or what comes after its reasoning, which may have `max_reasoning` tokens.
    """

    request_id: str
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    ignore_end: bool = False
    logprobs: int | None = None
    logits_file: str | None = None
    generated: list[int] = field(default_factory=list)
    resumed: bool = False
    keep: bool = False
    note: str = ""
    prompt_ids: list[int] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    template_args: dict[str, Any] = field(default_factory=dict)
    echo: bool = False
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    max_reasoning: int | None = None


@dataclass(frozen=True)
class Observe:
    """Read whole windows of token ids, all equally long, without a cache: for evaluation.

    Rank 0 writes what it saw to `file`, as safetensors: "logits" float32 [num_windows, num_tokens, vocab];
    "hidden.N" float32 [num_windows, num_tokens, width], layer N's output; "experts.N" uint32 [num_windows,
    num_tokens, top_k], for layers with experts. It answers Started and Done. Only this host's own
    supervisor can say it: the file is one of ours.
    """

    request_id: str
    windows: list[list[int]]
    file: str


@dataclass(frozen=True)
class Cancel:
    request_id: str


@dataclass(frozen=True)
class Loading:
    """So much of the weights is in the rank's memory; said now and then before Ready."""

    num_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Ready:
    """The rank has loaded the checkpoint and waits for its first epoch; `rank` is that of its Setup.

    `splits` are those that this model's family supports. Ranks of one `mlx_version` on one `architecture` of one
    `device` ("cpu" or "gpu") by the same `kernels` ("native" or "mlx") with the same `activation_bits` (0: not rounded)
    compute the same bits. `isa` and `num_threads` of native kernels change none. `dialect` is the checkpoint's.
    """

    rank: int
    family: str = ""
    context_length: int = 0
    vocab_size: int = 0
    num_experts: int = 0
    top_k: int = 0
    splits: list[str] = field(default_factory=list)
    load_s: float = 0.0
    mlx_version: str = ""
    architecture: str = ""
    device: str = ""
    kernels: str = "mlx"
    activation_bits: int = 0
    isa: str = ""
    num_threads: int = 0
    dialect: Dialect = field(default_factory=Dialect)


@dataclass(frozen=True)
class Joined:
    """The rank is in the epoch over MLX's own engine, `link`; of the mailbox, which is the rule, nothing is said."""

    epoch: int
    link: str


@dataclass(frozen=True)
class Choice:
    """The leader's planner settled on a split for one kind of work ("decode of 1": steps of about so many tokens).

    `reason` is for people; `costs_ms` are the medians behind it, of every split that was measured.
    """

    work: str
    split: str
    reason: str
    costs_ms: dict[str, float]


@dataclass(frozen=True)
class Steps:
    """Steps of one kind: their number, the tokens that went in, and the seconds that they took together."""

    split: str
    decode: bool
    num_steps: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class Load:
    """How often each expert of a layer was chosen, by its id, in the decode steps that were looked at."""

    layer: int
    chosen: list[int]


@dataclass(frozen=True)
class Drafted:
    """Tokens that drafts of one source ("lookup" or "model", engine/drafts.py) had, and those that were right."""

    source: str
    num_proposed: int
    num_accepted: int


@dataclass(frozen=True)
class Reading:
    """A prompt of which `num_read` of `num_tokens` are in the cache."""

    request_id: str
    num_read: int
    num_tokens: int


@dataclass(frozen=True)
class Stats:
    """What the leader's engine holds now, and what it has done since its last Stats; about once a second.

    `kv_bytes` are this rank's caches as allocated, `kv_budget_bytes` what those of open requests may take (0: no
    bound); `num_preempted` requests gave theirs up for others. `waits` counts the waits for peers inside exchanges by
    their length: element 0 took no time, element i 2^(i-1) to 2^i ns (empty: none, or a link that does not count them).
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_tokens: int = 0
    kv_bytes: int = 0
    reading: list[Reading] = field(default_factory=list)
    steps: list[Steps] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    waited_s: float = 0.0
    loads: list[Load] = field(default_factory=list)
    drafts: list[Drafted] = field(default_factory=list)
    kv_budget_bytes: int = 0
    num_preempted: int = 0


@dataclass(frozen=True)
class Ended:
    """The rank's epoch failed; it keeps its weights and waits for a Begin. `kind` names a TransportError's class."""

    epoch: int
    kind: str
    message: str


@dataclass(frozen=True)
class Fatal:
    """The rank cannot go on and ends; `kind` is the class name of an ExpertdError."""

    rank: int
    kind: str
    message: str


@dataclass(frozen=True)
class Candidate:
    """A token that may come next. `data` is what it adds to the text, in UTF-8, maybe a part of a character."""

    token_id: int
    data: bytes
    logprob: float

    @property
    def text(self) -> str:
        """Bytes that are no UTF-8 by themselves appear as \\xe4, as in OpenAI's answers."""
        return self.data.decode(errors="backslashreplace")


@dataclass(frozen=True)
class Logprobs:
    """The token that was chosen and the likeliest ones, likeliest first; model/sampler.py says of which distribution.

    `text_offset` is the number of the answer's characters before the token, stop strings included.
    """

    chosen: Candidate
    top: list[Candidate]
    text_offset: int


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it. `logprobs`, if asked for, has an element for each token but the first."""

    token_ids: list[int]
    text: str
    logprobs: list[Logprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Started:
    """The request is taken. `prompt` is there if the request asks for an echo."""

    request_id: str
    prompt_tokens: int
    prompt: Prompt | None = None


@dataclass(frozen=True)
class Token:
    """Newly generated token ids, and the text that became final with them (often empty, never torn).

    `logprobs` has as many elements as `token_ids` if the request asks for them.
    """

    request_id: str
    token_ids: list[int]
    text: str
    logprobs: list[Logprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """The end of a request; `finish_reason` is "stop", "length" or "cancelled".

    `cached_tokens` of the prompt were in another request's cache. `prefill_tokens_per_s` counts the rest until the
    first token is sampled, `decode_tokens_per_s` the tokens after the first (0 when there is none), interruptions
    included; of a resumed request, both since then. `split` and `ranks` are those of the end. `stop` is the stop string
    that ended the answer, if one did. `guessed_tokens` of the answer came from drafts (engine/speculate.py).
    """

    request_id: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    split: str
    ranks: int
    stop: str = ""
    cached_tokens: int = 0
    guessed_tokens: int = 0


@dataclass(frozen=True)
class Rejected:
    """The request is not taken: it is wrong, or, if `busy`, too many are open already."""

    request_id: str
    message: str
    busy: bool = False


@dataclass(frozen=True)
class Failed:
    """The request is over; if `lost`, only because this leader is none any more: the next one may resume it."""

    request_id: str
    message: str
    lost: bool = False


Message = (
    Setup
    | Begin
    | Submit
    | Observe
    | Cancel
    | Loading
    | Ready
    | Joined
    | Choice
    | Stats
    | Ended
    | Fatal
    | Started
    | Token
    | Done
    | Rejected
    | Failed
)
codec = Codec(Message, MAX_FRAME_BYTES)
