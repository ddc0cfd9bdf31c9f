"""``dns:NAME:PORT``: the addresses of a name, a headless Service's, say; ``dns:_peers._tcp.NAME``: its SRV records.

Looked up again when the records expire, within 1 to 30 seconds. A name that does not exist, or has no records, is a
cluster without other peers; a server that does not answer, or fails, is a directory that is away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from functools import partial

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver

from weightd.daemon.addresses import is_address, join_address, parse_address
from weightd.daemon.lasting import lasting
from weightd.daemon.peers.finding.directory import MAX_MEMBERS, Backoff, BaseDirectory, Member, Opener

LIFETIME = 5.0  # seconds of one look-up, with all servers and tries
SOONEST, LATEST = 1.0, 30.0
NOTHING = 5.0  # seconds until the next look-up of a name without records
TARGETS_AT_ONCE = 16


def system_resolver() -> dns.asyncresolver.Resolver:
    """As resolv.conf says now, search list included."""
    resolver = dns.asyncresolver.Resolver()
    resolver.use_edns(0, 0, 1232)  # many addresses in one datagram; more come by TCP
    return resolver


def parse(kind: str, place: str) -> Opener:
    """A name and a port; the port may be left away for SRV records, which have their own."""
    if place.startswith("_") and ":" not in place:
        place += ":1"
    try:
        name, port = parse_address(place)
        if is_address(name):
            raise ValueError(f"{name} is an address, no name; static: takes those")
    except ValueError as error:
        raise ValueError(f"dns takes NAME:PORT, or the name of SRV records, as in dns:weightd.default.svc:7401 or "
                         f"dns:_peers._tcp.weightd.default.svc: {error}") from None  # fmt: skip
    return partial(DnsDirectory, name, port)


class DnsDirectory(BaseDirectory):
    """Looks a name up, again and again. It knows addresses, no stages."""

    def __init__(
        self, host: str, port: int, *, node: str, address: str,
        resolver: Callable[[], dns.asyncresolver.Resolver] = system_resolver,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name = f"dns {host}"
        self.own_host, self.own_port = parse_address(address)
        self._host = host
        self._port = port
        self._open_resolver = resolver
        self._task: asyncio.Task[None] | None = None
        self._wrong = f"{self.name}: not looked up yet"

    async def start(self) -> None:
        self._task = lasting(self._keep_looking(), f"asking {self.name} for peers")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _keep_looking(self) -> None:
        backoff = Backoff()
        while True:
            try:
                pause = await self._look()
            except Exception as error:  # whatever comes from outside: this goes on
                self.lost(str(error)[:500] or type(error).__name__)
                pause = max(SOONEST, backoff.failed())
            else:
                backoff.reset()
            await asyncio.sleep(pause)

    async def _look(self) -> float:
        """Look up once; returns the seconds until the records expire."""
        resolver = self._open_resolver()
        if self._host.startswith("_"):
            found, ttl = await self._services(resolver)
        else:
            addresses, ttl = await self._addresses(resolver, self._host, search=True)
            found = [(join_address(address, self._port), address, self._port) for address in addresses]
        self.put_all(self._peers(found))
        self.well("" if found else "the name does not exist, or has no such records")
        return min(max(ttl, SOONEST), LATEST)

    def _peers(self, found: Iterable[tuple[str, str, int]]) -> Iterable[tuple[str, Member]]:
        for node, host, port in found:
            try:
                host, port = parse_address(join_address(host, port))
            except ValueError as error:
                self.skip(join_address(host, port), error)
                continue
            if not self.is_own(host, port):
                yield join_address(host, port), Member(node, join_address(host, port), None)

    async def _addresses(
        self, resolver: dns.asyncresolver.Resolver, host: str, search: bool
    ) -> tuple[list[str], float]:
        """All addresses of a name.

        One family is enough where the other cannot be looked up, unless peers are known by the other: half a list is
        none, and the members from before are better.
        """
        kinds = (dns.rdatatype.A, dns.rdatatype.AAAA)
        answers = await asyncio.gather(*(_ask(resolver, host, kind, search) for kind in kinds), return_exceptions=True)
        found: list[str] = []
        ttl = LATEST
        for answer in answers:
            if isinstance(answer, dns.resolver.Answer):
                found += [record.address for record in answer]
                ttl = min(ttl, answer.chaining_result.minimum_ttl)
        for kind, answer in zip(kinds, answers, strict=True):
            if isinstance(answer, BaseException) and (not found or self._knows(kind)):
                raise answer
        return found, ttl if found else NOTHING

    def _knows(self, kind: dns.rdatatype.RdataType) -> bool:
        """Whether any peer is known by an address of this kind."""
        return any(member.address.startswith("[") == (kind == dns.rdatatype.AAAA) for member in self.members())

    async def _services(self, resolver: dns.asyncresolver.Resolver) -> tuple[list[tuple[str, str, int]], float]:
        """All SRV records, each with the addresses of its target."""
        answer = await _ask(resolver, self._host, dns.rdatatype.SRV, True)
        if answer is None:
            return [], NOTHING
        glue: dict[str, list[str]] = {}
        for rrset in answer.response.additional:
            if rrset.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
                glue.setdefault(rrset.name.to_text().lower(), []).extend(record.address for record in rrset)
        targets = {(record.target.to_text().lower(), record.port) for record in answer}
        if len(targets) > MAX_MEMBERS:
            self.skip(self._host, f"there are more than {MAX_MEMBERS} SRV records: not all are known here")
        at_once = asyncio.Semaphore(TARGETS_AT_ONCE)
        failed: list[Exception] = []

        async def resolve(target: str, port: int) -> list[tuple[str, str, int]]:
            async with at_once:
                try:
                    hosts = glue.get(target) or (await self._addresses(resolver, target, search=False))[0]
                except (dns.exception.DNSException, OSError) as error:
                    failed.append(error)
                    return []
            if not hosts:
                self.skip(target, "an SRV record names it, and it has no address")
            return [(target.rstrip("."), host, port) for host in hosts]

        found = await asyncio.gather(*(resolve(*target) for target in sorted(targets)[:MAX_MEMBERS]))
        if failed:  # half a list is none here, too
            raise failed[0]
        return [peer for peers in found for peer in peers], answer.chaining_result.minimum_ttl


async def _ask(
    resolver: dns.asyncresolver.Resolver, host: str, kind: dns.rdatatype.RdataType, search: bool
) -> dns.resolver.Answer | None:
    """One look-up; None where there are no such records."""
    try:
        return await resolver.resolve(host, kind, search=search, lifetime=LIFETIME)
    except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
        return None
