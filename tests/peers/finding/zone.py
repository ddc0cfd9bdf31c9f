"""A DNS server whose records a test changes as it likes."""

from __future__ import annotations

import socketserver
import struct
import threading
from collections.abc import Sequence

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rrset

from tests.servers import free_ports
from weightd.daemon.peers.finding import dns as dns_directory
from weightd.daemon.peers.finding.directory import Directory


class Zone:
    """A DNS server on loopback, by UDP and TCP. ``records`` may change at any time."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, str], Sequence[str]] = {}
        self.additional: dict[tuple[str, str], Sequence[str]] = {}
        self.ttl = 0
        self.failing: set[str] = set()
        """Types of records that are answered with SERVFAIL."""
        self.by_tcp = 0
        self._servers: list[socketserver.BaseServer] = []
        self.port = free_ports(1)[0]

    def start(self) -> None:
        zone = self

        class Datagram(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                data, channel = self.request
                channel.sendto(zone.answer(data, limit=512), self.client_address)

        class Stream(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                (size,) = struct.unpack("!H", self.rfile.read(2))
                answer = zone.answer(self.rfile.read(size), limit=65535)
                zone.by_tcp += 1
                self.wfile.write(struct.pack("!H", len(answer)) + answer)

        class TcpServer(socketserver.ThreadingTCPServer):
            allow_reuse_address = True

        place = ("127.0.0.1", self.port)
        self._servers = [socketserver.ThreadingUDPServer(place, Datagram), TcpServer(place, Stream)]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
        self._servers = []

    def answer(self, data: bytes, limit: int) -> bytes:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        name, kind = query.question[0].name, dns.rdatatype.to_text(query.question[0].rdtype)
        asked = name.to_text().lower().rstrip(".")
        if kind in self.failing:
            answer.set_rcode(dns.rcode.SERVFAIL)
        elif (asked, kind) in self.records:
            answer.answer.append(dns.rrset.from_text_list(name, self.ttl, "IN", kind, self.records[asked, kind]))
            for (other, other_kind), texts in self.additional.items():
                answer.additional.append(dns.rrset.from_text_list(f"{other}.", self.ttl, "IN", other_kind, texts))
        elif asked not in {known for known, _ in self.records}:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        wire = answer.to_wire(max_size=65535)
        if len(wire) > limit:
            answer.answer.clear()
            answer.additional.clear()
            answer.flags |= dns.flags.TC
            wire = answer.to_wire()
        return wire

    def open(self, place: str, address: str = "198.51.100.1:7401") -> Directory:
        """The directory that looks here instead of where resolv.conf says."""

        def resolver() -> dns.asyncresolver.Resolver:
            found = dns.asyncresolver.Resolver(configure=False)
            found.nameservers = ["127.0.0.1"]
            found.port = self.port
            return found

        return dns_directory.parse("dns", place)(node="me", address=address, resolver=resolver)  # type: ignore[call-arg]
