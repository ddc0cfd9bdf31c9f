"""HOST:PORT: where one listens and where one connects, which are not the same, and whose machine a host is.

Hosts are without brackets here; in HOST:PORT they stand around an IPv6 address.
"""

from __future__ import annotations

import ipaddress
import re
import socket


def parse_listen(text: str) -> tuple[str, int]:
    """Split HOST:PORT that this machine is to listen on; ValueError where it is anything else.

    The host is as it was written, 0.0.0.0, :: and whatever may be a name of this machine included; port 0 is any that
    is free.
    """
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+)):([0-9]{1,5})", text)
    if found is None or int(found[3]) > 65535:
        raise ValueError(f"expected HOST:PORT, as in 127.0.0.1:7400, found {text!r}")
    return found[1] or found[2], int(found[3])


def parse_address(text: str) -> tuple[str, int]:
    """Split HOST:PORT, the host in one spelling. ValueError where one cannot connect to it."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]{2,45})\]|([A-Za-z0-9_.-]{1,253})):([0-9]{1,5})", text)
    if found is None or not 1 <= int(found[3]) <= 65535:
        raise ValueError(f"expected HOST:PORT, as in 10.0.0.1:7401 or [::1]:7401, found {text[:300]!r}")
    host = (found[1] or found[2]).lower()
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        if found[1]:
            raise ValueError(f"{text[:300]!r}: no IPv6 address stands in the brackets") from None
        return host, int(found[3])
    if ip.is_unspecified or ip.is_multicast:
        raise ValueError(f"{text[:300]!r} is no address that one can connect to")
    return str(ip), int(found[3])


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_address(host: str) -> bool:
    """Whether a host is an IP address, and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host: localhost, or an address of the loopback interface."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_local(host: str) -> bool:
    """Whether an IP address is one of this machine's, as seen from this network namespace."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True
