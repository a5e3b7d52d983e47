"""Where rank 0 listens and by which interface this node reaches it; a fault of the machine where it does not.

gloo, left alone, takes the address that the host's own name resolves to (on Debian 127.0.1.1), and NCCL the
first interface it finds (often a container bridge). Both then hang. The route to rank 0 is the right answer.
"""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import socket
import struct
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from trainsys.errors import MachineFault

_SIOCGIFADDR = 0x8915  # linux/sockios.h
_PROBE_S = 3.0
PATIENCE_S = 300.0
"""A name that was just given to a node or a pod may take minutes to reach every name service."""
_RETRY_S = 2.0
_IF_INET6 = Path("/proc/net/if_inet6")


def resolve(host: str, patience_s: float = PATIENCE_S) -> str:
    """``host``'s address, IPv4 before IPv6; MachineFault where no name service knows it within ``patience_s``."""
    own, deadline, said = socket.gethostname(), time.monotonic() + patience_s, False
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            break
        except OSError as error:
            why = f"head node {host}: {own} cannot resolve this name ({error.strerror or error})"
        if time.monotonic() >= deadline:
            raise MachineFault(
                f"{why}, for {patience_s:g} s now; set NodeAddr in slurm.conf, add it to /etc/hosts, or set "
                "launch.env.MASTER_ADDR to its address"
            )
        if not said:
            print(f"trainsys: {why}; trying again for {patience_s:g} s", file=sys.stderr, flush=True)
            said = True
        time.sleep(min(_RETRY_S, patience_s))
    if said:
        print(f"trainsys: head node {host}: its name resolves now", file=sys.stderr, flush=True)
    return str(min(found, key=lambda f: f[0] != socket.AF_INET)[4][0])


def interfaces() -> dict[str, list[str]]:
    """This host's interfaces that have an address, with their addresses, IPv4 first."""
    names = [name for _, name in socket.if_nameindex()]
    found: dict[str, list[str]] = {name: [] for name in names}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it is down, or has no IPv4 address
            found[name].append(socket.inet_ntoa(answer[20:24]))
    if _IF_INET6.exists():
        for line in _IF_INET6.read_text(encoding="ascii").splitlines():
            digits, *_, name = line.split()
            found.setdefault(name, []).append(str(ipaddress.IPv6Address(bytes.fromhex(digits))))
    return {name: addresses for name, addresses in found.items() if addresses}


def towards(address: str) -> str:
    """The interface by which this host reaches ``address``; MachineFault where there is no route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket only looks up the route: nothing is sent
        except OSError as error:
            raise MachineFault(
                f"{socket.gethostname()} has no route to the head node at {address}: {error.strerror}; "
                f"its interfaces are {_listed()}"
            ) from None
        source = str(probe.getsockname()[0])
    own = interfaces()
    for name, addresses in own.items():
        if source in addresses:
            return name
    # A second address of an interface is not in the answer to the ioctl; its network's interface is.
    return "lo" if ipaddress.ip_address(source).is_loopback and "lo" in own else next(iter(own), "lo")


def check(name: str, address: str, port: int) -> None:
    """Whether a connection from interface ``name`` gets an answer from ``address``; a refusal is one too.

    MachineFault within 3 s where the interface is not there, has no address of this kind, or gets no answer.
    """
    own, host = interfaces(), socket.gethostname()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if name not in own:
        raise MachineFault(
            f"interface {name}: {host} has none of this name with an address; it has {_listed()}"
        )
    kind = [a for a in own[name] if (":" in a) == (family == socket.AF_INET6)]
    if not kind:
        version = "IPv6" if family == socket.AF_INET6 else "IPv4"
        raise MachineFault(
            f"interface {name}: {host} has no {version} address on it, as the head node {address} has"
        )
    if address in kind:
        return
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.bind((kind[0], 0))
            probe.connect((address, port))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                return
            raise MachineFault(
                f"interface {name} ({kind[0]}): no answer from the head node at {address}:{port} to {host} "
                f"({error.strerror or 'timed out'}); the route leads over {towards(address)}"
            ) from None


def settings(head: str, port: int, interface: str | None, environment: MutableMapping[str, str]) -> None:
    """Set MASTER_ADDR, MASTER_PORT and the interface of gloo and NCCL, where the user has not."""
    # A head node whose name is not known may have been given an address by hand.
    address = resolve(environment.get("MASTER_ADDR") or head)
    environment.setdefault("MASTER_ADDR", address)
    environment.setdefault("MASTER_PORT", str(port))
    name = interface or towards(address)
    if interface:
        check(interface, address, port)
    environment.setdefault("GLOO_SOCKET_IFNAME", name)
    # '=' takes the name as it is; without it NCCL takes it as a prefix (eth1 would match eth10).
    environment.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _listed() -> str:
    return ", ".join(f"{name} ({addresses[0]})" for name, addresses in interfaces().items())
