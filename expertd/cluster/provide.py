"""Copying a checkpoint from the leader to a host that lacks it, over a channel of its own (TLS, pinned identities)."""

import asyncio
from collections import deque
from collections.abc import Callable
from pathlib import Path

from expertd.checkpoint.manifest import FileEntry, Manifest
from expertd.checkpoint.store import Incoming, read_piece
from expertd.cluster.channel import Channel
from expertd.cluster.host_messages import Fetch, Piece, Refused, Want
from expertd.errors import CheckpointError, RemoteProtocolError

PIECE_BYTES = 1 << 20
# Pieces asked for ahead: enough to keep a 10 GB/s cable busy for the 0.5 ms that an answer takes.
NUM_AHEAD = 8


class Provider:
    """Serves the files of one checkpoint, and nothing else, to paired hosts."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._files = {f.name: f for f in manifest.files}

    async def serve(self, channel: Channel, fetch: Fetch) -> None:
        """Answer Want with Piece until the other end closes. Raises LinkDown then."""
        if fetch.content_hash != self._manifest.content_hash:
            await channel.send(Refused("another checkpoint is served now. Start again."))
            return
        while True:
            want = await channel.receive()
            file = self._files.get(want.name) if isinstance(want, Want) else None
            if file is None or not 0 <= want.offset <= file.size or not 0 < want.size <= PIECE_BYTES:
                raise RemoteProtocolError(f"asked for {want!r}, which is no piece of this checkpoint")
            try:
                data = await asyncio.to_thread(read_piece, self._folder, file, want.offset, want.size)
            except CheckpointError as e:
                await channel.send(Refused(str(e)))
                return
            await channel.send(Piece(want.name, want.offset, data))


async def fetch(channel: Channel, incoming: Incoming, progress: Callable[[int, int], None]) -> None:
    """Receive every missing piece. `progress(bytes here, of)`. Raises CheckpointError, LinkDown.

    What has come stays, so that a later call goes on where this one was cut off.
    """
    await channel.send(Fetch(incoming.manifest.content_hash))
    for file, offset in incoming.missing():
        await _fetch_file(channel, incoming, file, offset, progress)


async def _fetch_file(
    channel: Channel, incoming: Incoming, file: FileEntry, offset: int, progress: Callable[[int, int], None]
) -> None:
    if file.size == 0:
        await asyncio.to_thread(incoming.write, file, 0, b"")
    asked: deque[int] = deque()
    done = incoming.num_received
    while offset < file.size or asked:
        while offset < file.size and len(asked) < NUM_AHEAD:
            await channel.send(Want(file.name, offset, PIECE_BYTES))
            asked.append(offset)
            offset += PIECE_BYTES
        piece = await channel.receive()
        if isinstance(piece, Refused):
            raise CheckpointError(f"{file.name}: the other host cannot send it: {piece.reason}")
        at = asked.popleft()
        if not isinstance(piece, Piece) or (piece.name, piece.offset) != (file.name, at):
            raise RemoteProtocolError(f"wanted {file.name} from {at} on, found {type(piece).__name__}")
        await asyncio.to_thread(incoming.write, file, at, piece.data)
        done += len(piece.data)
        progress(done, incoming.manifest.total_bytes)
