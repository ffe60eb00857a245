"""Two hosts on one machine: network namespaces with names of their own, joined by a cable. They share the file system."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("host-1", "host-2")
"""No name service knows them; there is none."""
_SET_UP = """
set -e
hostname $0
names=$(readlink -f /etc/resolv.conf)
if [ -e "$names" ]; then mount --bind /dev/null "$names"; fi
echo ready
exec sleep 1000
"""


@dataclass(frozen=True)
class Host:
    """One of them, held by a process: when that ends and no other is left there, nothing remains."""

    name: str
    address: str
    holder: subprocess.Popen

    def command(self, *words: str) -> list[str]:
        """What runs `words` there, in the process that starts it."""
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", "--mount", *words]


def why_not() -> str | None:
    """Why this machine cannot have them."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "hostname", NAMES[0]], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"network namespaces are not permitted here: {tried.stderr.strip()}"


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """They are gone after the block, as is all that runs on them."""
    with ExitStack() as stack:
        hosts = [Host(name, address, stack.enter_context(_held(name))) for name, address in zip(NAMES, ADDRESSES, strict=True)]
        first, second = (str(host.holder.pid) for host in hosts)
        subprocess.run(["ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable", "netns", second], check=True)
        for host in hosts:
            for words in (f"addr add {host.address}/24 dev cable", "link set lo up", "link set cable up"):
                subprocess.run(host.command("ip", *words.split()), check=True)
        for host, other in zip(hosts, reversed(hosts), strict=True):
            subprocess.run(host.command("ip", "route", "add", "default", "via", other.address), check=True)
        yield hosts


@contextmanager
def _held(name: str) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(["unshare", "--net", "--uts", "--mount", "sh", "-c", _SET_UP, name], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "ready\n"
            yield holder
        finally:
            holder.kill()
