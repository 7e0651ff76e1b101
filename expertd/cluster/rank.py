"""The rank process: `python -m expertd.cluster.rank CONTROL_FD`, spawned by the supervisor.

Only this process imports MLX. Its first frame says who it is; then it loads the checkpoint, says Ready, and
lives through one epoch after the other until its supervisor ends. Its threads: the main one owns the engine and
MLX; one reads the control socket; the mailbox's C thread beats the pulse and ends the process with its supervisor.

An epoch ends for us in one of three ways, and all lead to the next Begin. A step fails: we say Ended and wait. The
supervisor has poisoned the mailbox: the step in progress fails, or the wait for a frame does. Or Begin comes while a
leader has nothing to do. Weights and caches stay; the mailbox is the epoch's. The old mailbox is kept open until then,
so that the pulse goes on: a rank without a pulse would be taken for a dead one.
"""

import gc
import os
import queue
import secrets
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from expertd.cluster.memory import prefix_cache_bytes
from expertd.config import GroupConfig
from expertd.engine.messages import (
    Begin,
    Cancel,
    Ended,
    Failed,
    Fatal,
    Joined,
    Loading,
    Message,
    Observe,
    Ready,
    Setup,
    Stats,
    Submit,
    codec,
)
from expertd.errors import (
    ClusterError,
    ConfigError,
    ExpertdError,
    LinkDown,
    LinkTimeout,
    RemoteProtocolError,
    TransportError,
)
from expertd.topology.machine import describe_machine, settle
from expertd.topology.threads import share_of_threads

if TYPE_CHECKING:
    from expertd.checkpoint.inspect import CheckpointInfo
    from expertd.engine.drafts import Drafter
    from expertd.engine.engine import Engine
    from expertd.engine.runner import Caches
    from expertd.link.mailbox import Mailbox
    from expertd.model.cache_files import CacheFiles
    from expertd.model.kernels import Kernels
    from expertd.model.mlx_link import MlxLink
    from expertd.model.model import Model

# The supervisor reads at once; one that does not for this long is stuck, and its ranks must not be.
SEND_TIMEOUT_S = 30.0
# What caches of finished requests may take unless the user says otherwise.
# The mailbox is sent before the Begin that speaks of it.
MAILBOX_TIMEOUT_S = 5.0
# Who asks again within this time finds the other ranks as they were; then they catch up with this one.
QUIET_S = 0.1
# How often a leader that works says what it did: as often as people look, and nothing beside a second's steps.
REPORT_S = 1.0


class Control:
    """This rank's end of the control socket: a reading thread, and sends with a deadline."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._decoder = sock, codec.decoder()
        self._outbox = bytearray()
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()

    def setup(self) -> Setup:
        """Wait for the first frame. Ends the process when the supervisor is gone."""
        while True:
            for message in self._decoder.feed(self._receive()):
                if isinstance(message, Setup):
                    return message
                raise RemoteProtocolError(f"first frame is {type(message).__name__}, wanted Setup")

    def start(self) -> None:
        threading.Thread(target=self._read, name="control", daemon=True).start()

    def send(self, message: Message) -> None:
        self.post(message)
        self.flush()

    def post(self, message: Message) -> None:
        """Send a message with the next `flush`. Each system call wakes the supervisor, which may then take this core:
        sent one by one, 16 tokens cost a step 1.8 ms."""
        self._outbox += codec.encode(message)

    def flush(self) -> None:
        data, self._outbox = memoryview(self._outbox), bytearray()
        while data:
            _, writable, _ = select.select([], [self._sock], [], SEND_TIMEOUT_S)
            if not writable:
                os._exit(1)
            try:
                data = data[self._sock.send(data, socket.MSG_DONTWAIT) :]
            except BlockingIOError:
                continue
            except OSError:  # the supervisor is gone, as `_receive` may not have noticed yet
                os._exit(0)

    def _read(self) -> None:
        while True:
            for message in self._decoder.feed(self._receive()):
                self.inbox.put(message)

    def _receive(self) -> bytes:
        try:
            data = self._sock.recv(1 << 16)
        except OSError:
            data = b""
        if not data:  # the supervisor closed it: our work is over, whatever step is running
            os._exit(0)
        return data


class Rank:
    """A loaded rank; `run` takes it through its epochs."""

    def __init__(
        self,
        setup: Setup,
        group: GroupConfig,
        control: Control,
        model: "Model",
        engine: "Engine",
        files: "CacheFiles | None" = None,
    ) -> None:
        self._lifeline_fd, self._group, self._control = setup.lifeline_fd, group, control
        self._channel = socket.socket(fileno=setup.fd_channel)
        self._channel.settimeout(MAILBOX_TIMEOUT_S)
        self._model, self._engine = model, engine
        self._mailbox: Mailbox | None = None
        self._leads = False
        self._files, self._caches = files, _caches_on_disk(files, model, _prefix_bytes(group))
        self._reported_at, self._said = 0.0, Stats()

    def run(self) -> NoReturn:
        begin = self._wait_begin()
        while True:
            begin = self._live(begin)

    def _live(self, begin: Begin) -> Begin:
        """Live through one epoch; gives the Begin of the next."""
        from expertd.engine.runner import Runner

        try:
            self._leads = begin.rank == 0
            runner = Runner(self._model, self._enter(begin), self._caches, self._files)
            if self._leads:
                self._engine.begin(runner, begin.split, begin.fractions)
            else:
                self._engine.abandon(f"another rank leads since epoch {begin.epoch}: {begin.reason}")
            while True:
                following = self._take_messages()
                self._control.flush()
                if following:
                    return following
                if self._leads:
                    self._engine.step()
                    self._report()
                    self._control.flush()
                else:
                    runner.follow()
        except TransportError as e:
            self._control.send(Ended(begin.epoch, type(e).__name__, str(e)))
        return self._wait_begin()

    def _report(self) -> None:
        """As leader, say Stats every REPORT_S seconds, if there is news."""
        if (now := time.monotonic()) - self._reported_at < REPORT_S:
            return
        self._reported_at = now
        if (stats := self._engine.stats()) != self._said:
            self._said = stats
            self._control.send(stats)

    def _enter(self, begin: Begin) -> "Mailbox | MlxLink":
        """Leave the old epoch's mailbox for the new one's; gives the link. Raises TransportError when none comes."""
        from expertd.link.mailbox import Mailbox

        for cache in self._caches.values():
            cache.evaluate()
        self._model.attach(None)
        if self._mailbox:
            self._mailbox.close()
            self._mailbox = None
        fd = self._receive_mailbox(begin.epoch)
        try:
            self._mailbox = Mailbox(
                fd,
                begin.rank,
                begin.num_ranks,
                step_timeout_s=self._group.exchange_timeout_s,
                pulse_timeout_s=self._group.pulse_timeout_s,
                lifeline_fd=self._lifeline_fd,
            )
        finally:
            os.close(fd)
        link = self._link_over(self._mailbox, begin)
        self._model.attach(link if begin.num_ranks > 1 else None)
        return link

    def _link_over(self, mailbox: "Mailbox", begin: Begin) -> "Mailbox | MlxLink":
        """What plans and rows travel by: the mailbox, or MLX's own engine, whose ranks meet through it."""
        if self._group.link != "mlx" or mailbox.num_ranks == 1:
            return mailbox
        from expertd.model.mlx_link import gather_over, open_link

        try:
            link = open_link(mailbox.rank, gather_over(mailbox), begin.address, begin.interface)
        except (ClusterError, ConfigError) as e:  # the epoch's end, not this rank's
            raise LinkDown(str(e)) from e
        self._control.send(Joined(begin.epoch, f"mlx ({link.backend})"))
        return link

    def _receive_mailbox(self, epoch: int) -> int:
        try:
            number, fds, _, _ = socket.recv_fds(self._channel, 8, 1)
        except TimeoutError as e:
            raise LinkTimeout(f"epoch {epoch}: no mailbox came within {MAILBOX_TIMEOUT_S:g} s") from e
        if (found := int.from_bytes(number, "big")) != epoch or len(fds) != 1:
            for fd in fds:
                os.close(fd)
            raise RemoteProtocolError(f"epoch {epoch}: {len(fds)} mailboxes came, for epoch {found}")
        return fds[0]

    def _take_messages(self) -> Begin | None:
        """Take what has come, until a Begin; a leader without work waits for it, at most IDLE_S."""
        from expertd.engine.runner import IDLE_S

        block = self._leads and self._engine.idle
        try:
            while True:
                message = self._control.inbox.get(block, QUIET_S if self._engine.is_ahead else IDLE_S)
                block = False
                if isinstance(message, Begin):
                    return message
                self._take(message)
        except queue.Empty:
            if block:
                self._engine.rest()
            return None

    def _wait_begin(self) -> Begin:
        """Wait for the next epoch; the control thread ends the process if there never is one."""
        while True:
            message = self._control.inbox.get()
            if isinstance(message, Begin):
                return message
            self._take(message)

    def _take(self, message: Message) -> None:
        if isinstance(message, Submit | Observe | Cancel) and self._leads:
            self._engine.take(message)
        elif isinstance(message, Submit | Observe):
            self._control.send(Failed(message.request_id, "this rank does not lead any more", lost=True))


def _load(setup: Setup, control: Control) -> Rank:
    from expertd.checkpoint.inspect import check_checkpoint
    from expertd.checkpoint.sizes import cache_bytes
    from expertd.engine.drafts import Drafts
    from expertd.engine.engine import Engine
    from expertd.engine.kv_budget import KvBudget
    from expertd.engine.prefix import Prefixes
    from expertd.engine.text import Tokenizer
    from expertd.model.dialect import find_dialect
    from expertd.model.kernels import open_kernels
    from expertd.model.model import Model

    group = _group(setup)
    info = check_checkpoint(Path(group.checkpoint))
    kernels = None
    if not group.wide:
        num_threads = share_of_threads(1 if group.cpus else group.num_ranks)
        kernels = open_kernels(group.kernels, group.activation_bits, num_threads)
    model = Model(
        info.folder,
        info.config,
        group.wide,
        kernels,
        lambda done, total: control.send(Loading(done, total)),
        group.kv_bits,
    )
    model.require(group.split)
    # Every rank may come to lead, and has no time to spare then.
    tokenizer = Tokenizer(info.folder, info.config)
    tokenizer.speak(find_dialect(tokenizer.inner))
    engine = Engine(
        tokenizer,
        info.context_length,
        model.splits,
        group.prefill_chunk,
        control.post,
        _vocab_size(info) or tokenizer.size,
        control.flush,
        kv=KvBudget(group.kv_cache_bytes or 0, lambda n: cache_bytes(info.config, n, group.kv_bits)),
    )
    engine.max_streams, engine.max_waiting = group.max_streams, group.max_waiting
    engine.speculates = group.speculate
    engine.drafts = Drafts(_open_drafter(group, model, engine, kernels))
    engine.first_id = secrets.randbits(40) << 20
    engine.prefixes = Prefixes(_prefix_bytes(group), group.prefill_chunk, model.one_by_one)
    ready = replace(
        _ready(setup.rank, info, model, kernels),
        dialect=tokenizer.dialect,
        context_length=engine.most_tokens,
    )
    rank = Rank(setup, group, control, model, engine, _open_files(group, ready, info.folder))
    # What is loaded stays: without this, looking through all of it for garbage takes 3 % of a decode step. It takes
    # 0.1 s itself, which others would wait for: an epoch may begin as soon as this rank says that it is ready.
    gc.collect()
    gc.freeze()
    control.send(ready)
    return rank


def _open_drafter(
    group: GroupConfig, model: "Model", engine: "Engine", kernels: "Kernels | None"
) -> "Drafter | None":
    """This rank's draft model, for when it leads; None where it cannot help."""
    if not group.draft_model:
        return None
    from expertd.engine.drafts import open_drafter
    from expertd.model.caches import SequenceCache

    if model.one_by_one or not SequenceCache(model.new_cache()).forgets:
        reason = "its caches cannot be cut, or a token's bits depend on those beside it"
        print(
            f"expertd: --draft-model is not used: nothing is guessed for this model ({reason})",
            file=sys.stderr,
        )
        return None
    folder = Path(group.draft_model)
    return open_drafter(folder, engine.tokenizer, engine.vocab_size, group.prefill_chunk, kernels)


def _open_files(group: GroupConfig, ready: Ready, folder: Path) -> "CacheFiles | None":
    """Where this rank's caches are kept across restarts, by all that their bits depend on; None for nowhere."""
    if not group.prefix_cache_dir or group.prefix_cache_bytes == 0:
        return None
    from expertd.model.cache_files import CacheFiles, checkpoint_key

    computed_by = (ready.mlx_version, ready.device, ready.architecture, ready.kernels, ready.activation_bits)
    versions = (version("expertd"), version("mlx-lm"))
    key = checkpoint_key(folder, *versions, *computed_by, group.prefill_chunk, group.kv_bits)
    root = Path(group.prefix_cache_dir)
    return CacheFiles(root, key, group.prefix_disk_bytes, writes=ready.rank == 0)


def _caches_on_disk(files: "CacheFiles | None", model: "Model", max_bytes: int) -> "Caches":
    if files is None:
        return {}
    from expertd.engine.runner import SOLO
    from expertd.model.caches import SequenceCache

    like = SequenceCache(model.new_cache())
    model.prefill([0, 0], like.layers, SOLO)
    return files.load(like, max_bytes)


def _prefix_bytes(group: GroupConfig) -> int:
    """This rank's part of what its host keeps for later requests."""
    return prefix_cache_bytes(group) // group.num_ranks


def _vocab_size(info: "CheckpointInfo") -> int:
    """The number of logits, 0 where the config does not say."""
    from expertd.checkpoint.config import text_config

    return int(text_config(info.config).get("vocab_size") or 0)


def _ready(rank: int, info: "CheckpointInfo", model: "Model", kernels: "Kernels | None") -> Ready:
    import mlx.core as mx

    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    machine = describe_machine()
    return Ready(
        rank=rank,
        family=info.family,
        context_length=info.context_length,
        vocab_size=_vocab_size(info),
        num_experts=info.num_experts,
        top_k=info.top_k,
        splits=model.splits,
        load_s=model.load_s,
        mlx_version=machine["mlx"],
        architecture=f"cpu: {machine['cpu']}" if device == "cpu" else str(mx.device_info()["architecture"]),
        device=device,
        kernels="native" if kernels else "mlx",
        activation_bits=kernels.activation_bits if kernels else 0,
        isa=kernels.isa if kernels else "",
        num_threads=kernels.num_threads if kernels else 0,
    )


def _group(setup: Setup) -> GroupConfig:
    group = GroupConfig(**setup.group)
    cpus = tuple(tuple(c) for c in group.cpus)
    return replace(group, shares=tuple(group.shares), cpus=cpus)


def share_cores(num_ranks: int) -> None:
    """Let NumPy's BLAS, by which evaluation multiplies, take this rank's share of the cores.

    It reads this once, when NumPy is imported, which must come later. Its idle threads spin: with one per core in
    both of two ranks on two cores, 8 windows of the demo model take 40 s, with one in each 12 s. No digit changes.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, cores // num_ranks)))


def main() -> None:
    # Ctrl-C goes to the terminal's foreground group; ending this process is the supervisor's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = Control(socket.socket(fileno=int(sys.argv[1])))
    setup = control.setup()
    control.start()
    cpus = setup.group.get("cpus")
    settle(cpus[setup.rank] if cpus else ())
    if setup.group.get("wide"):
        share_cores(int(setup.group["num_ranks"]))
    try:
        rank = _load(setup, control)
        rank.run()
    except ExpertdError as e:
        control.send(Fatal(setup.rank, type(e).__name__, str(e)))
    except Exception as e:
        control.send(Fatal(setup.rank, "ClusterError", f"{type(e).__name__}: {e}"))
        if os.environ.get("EXPERTD_DEBUG"):
            raise
    os._exit(1)  # MLX's stream thread may still sit in an exchange; nothing here needs a tidy end


if __name__ == "__main__":
    main()
