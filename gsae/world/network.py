"""The network between hosts. In: what the launcher set in the environment. Out: the interface over which gloo is to talk.

Gloo listens where this host's own name resolves to, which is often the loopback: then no other host reaches it. NCCL looks for itself.
"""

import os
import socket
from typing import Any

import psutil

CHOICE = "GLOO_SOCKET_IFNAME"
"""The environment variable by which gloo takes an interface."""
_ELSEWHERE = "203.0.113.1"
"""An address of no host (RFC 5737): the way there is the default route. Nothing is sent."""


def host_name() -> str:
    """What this host is called: by Slurm in a job of it, else by itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def choose_interface() -> None:
    """Where the ranks are on several hosts: set `GLOO_SOCKET_IFNAME` to the interface that leads to the first rank, unless it is set."""
    if CHOICE in os.environ or os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        return
    first = os.environ.get("MASTER_ADDR", "")
    address = _own_address(first)
    if address is not None and _is_loopback(address) and not _is_loopback(first):
        address = _own_address(_ELSEWHERE)  # the first rank's host, whose name stands for the loopback on itself
    interface = _interface_of(address)
    if interface is not None:
        os.environ[CHOICE] = interface


def _own_address(towards: str) -> str | None:
    """The address that this host has on the way to another one, or to itself; None where there is no way."""
    try:
        family, _, _, _, place = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect(place)
            return str(way.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _interface_of(address: str | None) -> str | None:
    interfaces: dict[str, Any] = psutil.net_if_addrs()
    return next((name for name, entries in interfaces.items() if address in {entry.address for entry in entries}), None)
