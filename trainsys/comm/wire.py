"""Sockets between the ranks of a run, opened when two of them have something to say to each other.

Host-side traffic (what checkpoints, windows of telemetry and set-up exchange) goes over these and not over a process
group: a gloo group of all ranks holds a socket to every other rank, and an NCCL group carries device tensors only.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from trainsys.launch.network import interfaces

_HEAD = struct.Struct("!4sIQ")
"""operation, its number on this wire, bytes that follow"""
_HELLO = struct.Struct("!16sI")
"""the listener's token, the caller's rank"""
_RETRY_S = 0.05
_CHUNK = 64 << 20
_CONNECT_S = 10.0


class LostPeer(RuntimeError):
    """A rank ended, did not answer in time, or is doing something else than this one."""


class Peer:
    """A connection to ``rank``. Every call ends within ``timeout_s`` seconds without progress, in LostPeer."""

    def __init__(self, rank: int, to: socket.socket, timeout_s: float) -> None:
        self.rank, self._socket = rank, to
        self.timeout_s = timeout_s
        to.settimeout(timeout_s)
        to.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that is lost sends no end of the connection: after two minutes of silence it is asked for.
        to.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 120), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
            to.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, op: bytes, number: int, *parts: bytes | bytearray | memoryview) -> None:
        """One message of four letters ``op``; ``parts`` are joined."""
        with self._blaming():
            self._socket.sendall(_HEAD.pack(op, number, sum(len(p) for p in parts)))
            for view in map(memoryview, parts):
                # A socket's time-out is that of a whole sendall.
                for start in range(0, len(view), _CHUNK):
                    self._socket.sendall(view[start : start + _CHUNK])

    def receive(self, op: bytes, number: int) -> bytearray:
        """What the peer's ``send`` of the same ``op`` and ``number`` sent."""
        data = bytearray(self._expect(op, number))
        self._fill(memoryview(data))
        return data

    def receive_into(self, op: bytes, number: int, out: memoryview) -> None:
        """The same into ``out``, which must be of the message's size."""
        size = self._expect(op, number)
        if size != len(out):
            raise LostPeer(f"rank {self.rank} sent {size} bytes where {len(out)} were expected")
        self._fill(out)

    def introduce(self, hello: bytes, token: bytes, within_s: float) -> None:
        """Say ``hello`` and wait until the other side, which may be busy elsewhere, answers with its token."""
        with self._blaming():
            self._socket.settimeout(within_s)
            self._socket.sendall(hello)
            answer = bytearray(len(token))
            self._fill(memoryview(answer))
            self._socket.settimeout(self.timeout_s)
        if answer != token:
            raise LostPeer("another process listens there")

    def close(self) -> None:
        """A thread that waits in a call gets LostPeer; what was sent still arrives."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _expect(self, op: bytes, number: int) -> int:
        head = bytearray(_HEAD.size)
        self._fill(memoryview(head))
        found, at, size = _HEAD.unpack(head)
        if (found, at) != (op, number):
            raise LostPeer(
                f"rank {self.rank} is at {found.decode(errors='replace')} {at} of the ranks' exchanges, "
                f"this one at {op.decode()} {number}: they do not run the same program"
            )
        return int(size)

    def _fill(self, out: memoryview) -> None:
        with self._blaming():
            while len(out):
                got = self._socket.recv_into(out)
                if not got:
                    raise LostPeer(f"rank {self.rank} has ended (it closed its connection)")
                out = out[got:]

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Errors of the socket name the rank."""
        try:
            yield
        except TimeoutError as error:
            raise LostPeer(f"no answer from rank {self.rank} within {self.timeout_s:g} s") from error
        except OSError as error:
            raise LostPeer(f"rank {self.rank} has ended ({error.strerror or error})") from error


class Wire:
    """Connects this rank with others by number; for one thread at a time. ``name``: the same on every rank, and
    no other wire's.

    ``store`` holds each rank's address and token, and is used from the making thread and by `dial` alone. Whoever
    calls must know the token, so that nothing but a rank of this run is listened to.
    """

    def __init__(self, store: dist.Store, name: str, rank: int, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self._store, self._key = store, f"trainsys/{name}"
        self._token = secrets.token_bytes(16)
        host = own_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=128)
        self._early: dict[int, Peer] = {}
        """Who called before this rank expected it."""
        self._store.set(f"{self._key}/{rank}", f"{host} {self._listener.getsockname()[1]} {self._token.hex()}")

    def dial(self, rank: int) -> Peer:
        """Call ``rank``, which must `answer`. LostPeer where it does not within the time-out."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            # Read again at each try: after a restart that kept the store, the first may be of the attempt before.
            address = self._address(rank, deadline)
            try:
                return self._call(rank, address, deadline)
            except (OSError, LostPeer) as error:
                if time.monotonic() > deadline:
                    raise LostPeer(
                        f"rank {rank} does not answer at {address[0]}:{address[1]} ({error})"
                    ) from error
                time.sleep(_RETRY_S)

    def answer(self, rank: int) -> Peer:
        """Wait until ``rank`` calls."""
        deadline = time.monotonic() + self.timeout_s
        while rank not in self._early:
            self._listener.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                caller, _ = self._listener.accept()
            except TimeoutError:
                raise LostPeer(f"rank {rank} has not called within {self.timeout_s:g} s") from None
            self._greet(caller)
        return self._early.pop(rank)

    def close(self) -> None:
        self._listener.close()
        for peer in self._early.values():
            peer.close()

    def _address(self, rank: int, deadline: float) -> tuple[str, int, bytes]:
        try:
            key = f"{self._key}/{rank}"
            self._store.wait([key], timedelta(seconds=max(1.0, deadline - time.monotonic())))
            host, port, token = self._store.get(key).decode().split()
        except dist.DistError as error:
            raise LostPeer(f"rank {rank} has not started within {self.timeout_s:g} s: {error}") from error
        return host, int(port), bytes.fromhex(token)

    def _call(self, rank: int, address: tuple[str, int, bytes], deadline: float) -> Peer:
        host, port, token = address
        peer = Peer(rank, socket.create_connection((host, port), timeout=_CONNECT_S), self.timeout_s)
        try:
            peer.introduce(_HELLO.pack(token, self.rank), token, max(1.0, deadline - time.monotonic()))
        except LostPeer:
            peer.close()
            raise
        return peer

    def _greet(self, caller: socket.socket) -> None:
        caller.settimeout(10.0)
        hello = bytearray(_HELLO.size)
        view = memoryview(hello)
        with suppress(OSError):
            while len(view):
                got = caller.recv_into(view)
                if not got:
                    break
                view = view[got:]
            token, rank = _HELLO.unpack(hello)
            if not len(view) and secrets.compare_digest(token, self._token):
                caller.sendall(self._token)
                self._early[rank] = Peer(rank, caller, self.timeout_s)
                return
        caller.close()


def own_address() -> str:
    """How other hosts reach this one: the address of gloo's interface where one is set, else of the way to
    MASTER_ADDR, else MASTER_ADDR itself, where this is its host."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "")
    listed = interfaces().get(name, []) if name else []
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    own = listed[0] if listed else _towards(master)
    return master if own is None or ipaddress.ip_address(own).is_loopback else own


def _towards(host: str) -> str | None:
    """This host's address on the route to ``host``."""
    with suppress(OSError):
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        family, kind, _, _, address = min(found, key=lambda f: f[0] != socket.AF_INET)
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # only looks up the route: nothing is sent
            return str(probe.getsockname()[0])
    return None
