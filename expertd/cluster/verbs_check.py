"""Can this host use RDMA? Asked in a process of its own: any call into a verbs driver may hang for ever."""

import asyncio
import contextlib
import os
import sys

CHECK_TIMEOUT_S = 10.0


async def why_no_verbs(library: str) -> str:
    """Why this host cannot use RDMA verbs, as one line; "" when a device has an active port with an IPv4 address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "expertd.link.verbs", library),  # its last lines say what that prints
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
    )
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            said, _ = await process.communicate()
    except TimeoutError:
        return f"the verbs driver did not answer within {CHECK_TIMEOUT_S:g} s; re-plug the cable or restart"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    if process.returncode:
        return f"the verbs driver ended its process with code {process.returncode}; run `expertd doctor`"
    return said.decode(errors="replace").strip()[:300]
