"""Settings as frozen values, checked once, at the edge; nothing below reads flags or the environment."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from expertd.errors import ConfigError

MAX_RANKS = 4
# Where a serving host listens for its paired hosts, and `expertd pair` for a new one.
CONTROL_PORT = 7420
PAIRING_PORT = 7421
SPLITS = ("auto", "solo", "experts", "tokens", "sequences")
LINKS = ("auto", "verbs", "tcp", "mlx")
KERNELS = ("auto", "native", "mlx")
# How finely the native kernels round activations before they meet quantized weights. 8: on the demo model the
# divergence from MLX's float32 logits is 2.7e-4 and the perplexity 0.04 % higher (16: 9e-9 and none), at half the time
# (bench/LOG.md).
ACTIVATION_BITS = 8
# How many bits keys and values may be kept at; 0: as they are computed.
KV_BITS = (0, 4, 8)
# A thousand tokens of a 30B model are 100 MB.
PREFIX_DISK_BYTES = 20 * 10**9

UNITS = {
    "": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40,
}  # fmt: skip
SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]i?)?b?", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "128GB" (10^9), "120GiB" (2^30) or "9500000000". Raises ConfigError."""
    match = SIZE.fullmatch(text.strip())
    num_bytes = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if match and not match[2] and "." not in match[1]:
        num_bytes = int(match[1])
    if num_bytes < 1:
        raise ConfigError(f"size {text[:40]!r}: wanted bytes or a size such as 128GB or 120GiB.")
    return num_bytes


@dataclass(frozen=True)
class GroupConfig:
    """What a group of ranks on one host needs to run one checkpoint.

    `checkpoint` is a local folder that `expertd.checkpoint` has checked. `shares` are the ranks'
    fractions of a split (empty: equal); they need not add up to 1. `cpus[r]` pins rank r to those
    processors (empty: not pinned). Waits inside one step may add up to `exchange_timeout_s`; a rank
    whose pulse is silent for `pulse_timeout_s` is dead (half a second proved too short: with five busy
    processes on two cores a living rank was silent for longer). `link` is how ranks swap rows: "auto" takes the mailbox
    on one host and the fastest link between two, "mlx" is MLX's own engine. Up to `max_streams` requests are
    answered at once, `max_waiting` more wait; their caches may take `kv_cache_bytes` on each rank (None: as much as is
    free, which cluster/memory.py turns into a number; 0: no bound). The caches of finished requests stay, for others
    that begin alike, in `prefix_cache_bytes` of memory for all ranks (None: a tenth of it; 0: none stays), and in up to
    `prefix_disk_bytes` of files in `prefix_cache_dir` ("": nowhere). With `speculate`, tokens are guessed and checked
    several at a time (engine/speculate.py); `draft_model` is the folder of a small model that guesses as well.
    Caches keep keys and values at `kv_bits` (0: as they are computed). `kernels` are what computes on a CPU:
    "native" ours (`activation_bits`, 8 or 16, is theirs), "mlx" MLX's, whose bits are others; "auto" takes ours on a
    CPU and MLX's on a GPU. `wide` is for evaluation: weights as float32 (expertd/model/adapter.py), which MLX and NumPy
    compute. `ignore_memory` loads what seems not to fit.
    """

    checkpoint: str
    num_ranks: int = 1
    split: str = "auto"
    shares: tuple[float, ...] = ()
    prefill_chunk: int = 512
    max_streams: int = 16
    max_waiting: int = 256
    kv_cache_bytes: int | None = None
    prefix_cache_bytes: int | None = None
    prefix_cache_dir: str = ""
    prefix_disk_bytes: int = PREFIX_DISK_BYTES
    speculate: bool = False
    draft_model: str = ""
    kv_bits: int = 0
    slot_bytes: int = 1 << 20
    exchange_timeout_s: float = 60.0
    pulse_timeout_s: float = 1.5
    cpus: tuple[tuple[int, ...], ...] = ()
    link: str = "auto"
    kernels: str = "auto"
    activation_bits: int = ACTIVATION_BITS
    wide: bool = False
    ignore_memory: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= MAX_RANKS:
            raise ConfigError(
                f"--ranks {self.num_ranks}: expertd runs 1 to {MAX_RANKS} ranks. Choose one of these."
            )
        if self.split not in SPLITS:
            raise ConfigError(f"--split {self.split}: unknown split. Choose one of {', '.join(SPLITS)}.")
        if self.link not in LINKS:
            raise ConfigError(f"--link {self.link}: unknown link. Choose one of {', '.join(LINKS)}.")
        if self.kernels not in KERNELS:
            raise ConfigError(
                f"--kernels {self.kernels}: unknown kernels. Choose one of {', '.join(KERNELS)}."
            )
        if self.activation_bits not in (8, 16):
            raise ConfigError(f"--activation-bits {self.activation_bits}: wanted 8 or 16.")
        if self.kv_bits not in KV_BITS:
            raise ConfigError(f"--kv-bits {self.kv_bits}: wanted 8 or 4, or leave it out.")
        if self.shares and (
            len(self.shares) != self.num_ranks or min(self.shares) < 0 or sum(self.shares) <= 0
        ):
            raise ConfigError(
                f"--shares {','.join(map(str, self.shares))}: wanted {self.num_ranks} numbers >= 0, one per rank, "
                "not all zero."
            )
        if self.prefill_chunk < 1:
            raise ConfigError(f"--prefill-chunk {self.prefill_chunk}: wanted at least 1 token.")
        if self.max_streams < 1 or self.max_waiting < 0:
            raise ConfigError(
                f"--max-streams {self.max_streams}, --max-waiting {self.max_waiting}: wanted at least 1 and 0."
            )
        if (self.kv_cache_bytes or 0) < 0:
            raise ConfigError(f"--kv-cache {self.kv_cache_bytes}: wanted 0 or more.")
        if (self.prefix_cache_bytes or 0) < 0:
            raise ConfigError(f"--prefix-cache {self.prefix_cache_bytes}: wanted 0 or more.")

    @property
    def fractions(self) -> tuple[float, ...]:
        """The shares scaled to a sum of 1, equal when none were given."""
        shares = self.shares or (1.0,) * self.num_ranks
        return tuple(s / sum(shares) for s in shares)


@dataclass(frozen=True)
class DoorConfig:
    """Who may use the HTTP server, and what it writes down.

    `keys` are names and SHA-256 digests (server/keys.py); without any, everybody may. With `tls_cert` and `tls_key`,
    PEM files, it speaks HTTPS. Browsers on pages of `cors_origins` may ask, "*" for all. `log_json` writes a line for
    each request to standard error, with its body only if `log_prompts`.
    """

    keys: tuple[tuple[str, str], ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    cors_origins: tuple[str, ...] = ()
    log_json: bool = False
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("--tls-cert and --tls-key need each other. Give both, or none.")
        if self.log_prompts and not self.log_json:
            raise ConfigError("--log-prompts: needs --log-json. Add it, or leave --log-prompts out.")


@dataclass(frozen=True)
class ServerConfig:
    """Where the HTTP server listens, under which model id it answers, and whom."""

    host: str = "127.0.0.1"
    port: int = 8080
    model_id: str = "demo"
    group: GroupConfig = field(default_factory=lambda: GroupConfig(checkpoint=""))
    door: DoorConfig = field(default_factory=DoorConfig)

    @property
    def scheme(self) -> str:
        return "https" if self.door.tls_cert else "http"


@dataclass(frozen=True)
class HostsConfig:
    """How this host meets others. `folder` holds identity and paired hosts, `cache` what can be made again, `store`
    the checkpoints that were copied from other hosts.

    Paired hosts may call at control_host:control_port ("" is every address). A host or link silent for `silence_s` is
    gone; setting a link up may take `setup_s`. `verbs_library` "" is the platform's; `lint` checks Apple's rules at
    every call.
    """

    folder: Path
    cache: Path
    store: Path
    control_host: str = ""
    control_port: int = 7420
    silence_s: float = 0.8
    setup_s: float = 20.0
    verbs_library: str = ""
    lint: bool = False

    @property
    def manifests(self) -> Path:
        return self.cache / "manifests"
