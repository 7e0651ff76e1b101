"""`expertd serve` with a stub rank, in a process of its own: `python stub_server.py FOLDER` prints its port."""

import asyncio
import sys
from pathlib import Path

import stub_group

from expertd.config import ServerConfig
from expertd.server import serve


def main() -> None:
    stub_group.use_stub()
    config = ServerConfig(port=0, group=stub_group.group_of(Path(sys.argv[1])))
    listener = serve.take_port(config)
    port = listener.getsockname()[1]
    asyncio.run(serve.serve(config, listener, lambda cluster: print(port, flush=True)))


if __name__ == "__main__":
    main()
