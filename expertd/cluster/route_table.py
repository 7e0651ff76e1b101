"""The leader's view of the ways between all hosts of its group: who measures, and which way each pair takes."""

from collections.abc import Sequence

from expertd.cluster.host_messages import HostAddress, Measure, PathReport
from expertd.cluster.member import Member
from expertd.cluster.paths import Paths, best_path
from expertd.cluster.site import SetupFailed
from expertd.errors import ExpertdError
from expertd.link.messages import LinkPeer

# (a, b) with a < b, indices in an epoch: the way from b, which calls, to a.
Routes = dict[tuple[int, int], PathReport]


class RouteTable:
    """Host 0 is this one, with `host_id`; the others are numbered in the order in which they are given."""

    def __init__(self, paths: Paths, host_id: str, name: str) -> None:
        self._paths, self._host_id, self._name = paths, host_id, name
        self._chosen: dict[tuple[str, str], PathReport] = {}

    async def measure(self, members: Sequence[Member]) -> None:
        """Let each host measure its ways to those before it, unless it has done so. Raises SetupFailed, LinkDown."""
        for index, member in enumerate(members):
            if self._host_id not in member.paths:
                near = member.channel.local_address
                addresses = self._paths.addresses(near)
                message = Measure(self._host_id, self._name, self._paths.probe_port, addresses)
                await _measure(index + 1, member, message)
            for other in members[:index]:
                if other.host_id not in member.paths:
                    await _measure(index + 1, member, _measure_of(other))

    def routes(self, members: Sequence[Member]) -> Routes:
        """Choose the way of each pair. Raises SetupFailed, with the host's index, when there is none."""
        ids = [self._host_id, *(m.host_id for m in members)]
        names = [self._name, *(m.name for m in members)]
        routes: Routes = {}
        for b in range(1, len(ids)):
            for a in range(b):
                found = members[b - 1].paths.get(ids[a], [])
                best = best_path(found, self._chosen.get((ids[a], ids[b])))
                if best is None:
                    members[b - 1].paths.pop(ids[a], None)  # measured again next time
                    raise SetupFailed(_no_way(names[b], names[a], found), b)
                routes[a, b] = self._chosen[ids[a], ids[b]] = best
        return routes

    def chosen(self, host_id: str) -> PathReport | None:
        """The way between this host and another."""
        return self._chosen.get((self._host_id, host_id))


async def _measure(index: int, member: Member, message: Measure) -> None:
    try:
        await member.measure(message)
    except ExpertdError as e:
        e.site = index  # type: ignore[attr-defined]  # it is this host that holds up the others
        raise


def _measure_of(member: Member) -> Measure:
    return Measure(member.host_id, member.name, member.join.probe_port, member.join.addresses)


def _no_way(caller: str, listener: str, found: Sequence[PathReport]) -> str:
    tried = "; ".join(
        f"{p.local.interface} {p.local.address} to {p.remote.address}: {p.error}" for p in found
    )
    return (
        f"no way from host {caller} to host {listener} works ({tried or 'they have no subnet in common'}). "
        "Give both ends of the cable an address on one subnet; `expertd topology` shows them."
    )


def listen_address(host: int, num_hosts: int, routes: Routes) -> str:
    """Where the link process of `host` listens: the one address that later hosts call, any when there are several."""
    called = {routes[host, other].remote.address for other in range(host + 1, num_hosts)}
    return "" if not called else called.pop() if len(called) == 1 else "0.0.0.0"


def peers_of(host: int, ports: Sequence[int], routes: Routes) -> list[LinkPeer]:
    """Whom the link process of `host` meets: it calls the hosts before it, and those after it call."""
    return [_peer(host, other, ports[other], routes) for other in range(len(ports)) if other != host]


def _peer(host: int, other: int, port: int, routes: Routes) -> LinkPeer:
    route = routes[min(host, other), max(host, other)]
    own: HostAddress = route.local if host > other else route.remote
    theirs: HostAddress = route.remote if host > other else route.local
    return LinkPeer(other, theirs.address, port if other < host else 0, own.address, own.interface)
