"""Links: how bytes get from one process to the other, with a time-out on everything.

`GlooLink` is torch.distributed: point-to-point messages of bytes over its gloo backend, in a process group of its own (the
default group of the program is left alone). `TcpLink` is a plain socket. They carry the same frames; the difference is what a
peer can do that does not keep to the protocol: gloo ends the *receiving process* when a message is longer than the buffer that
waits for it, where a socket just has more bytes to read. So gloo is for two processes that trust each other, and a server
that anybody may reach takes `TcpLink`. Neither encrypts nor authenticates: tunnel them where the network is not yours.
"""

from __future__ import annotations

import contextlib
import socket
import time
from datetime import timedelta
from typing import Any, Protocol

import torch

from dyndepth.errors import SplitError


class Link(Protocol):
    """Bytes, in order. Both raise SplitError when `timeout` seconds pass or the other side is gone; the link is then dead."""

    def write(self, data: bytes, timeout: float) -> None:
        """Send all of `data`."""

    def read(self, size: int, timeout: float) -> bytes:
        """Exactly `size` bytes."""

    def close(self) -> None:
        """Give the link up; the other side's next read fails."""


class TcpLink:
    """A connected socket. `connect` and `accept` make the two ends; a deadline holds for a whole read or write."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        with contextlib.suppress(OSError):  # not a TCP socket (a socket pair in tests)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def connect(cls, host: str, port: int, timeout: float = 30.0) -> TcpLink:
        """Connect to a listening server, trying again until `timeout` seconds passed."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return cls(socket.create_connection((host, port), max(deadline - time.monotonic(), 1e-3)))
            except OSError as error:
                if time.monotonic() + 0.05 >= deadline:
                    raise SplitError(f"link: no connection to {host}:{port} within {timeout:g} s: {error}") from error
                time.sleep(0.05)

    @classmethod
    def accept(cls, listening: socket.socket, timeout: float = 30.0) -> TcpLink:
        """The next connection of a listening socket."""
        listening.settimeout(timeout)
        try:
            return cls(listening.accept()[0])
        except OSError as error:
            raise SplitError(f"link: nobody connected within {timeout:g} s: {error}") from error

    def write(self, data: bytes, timeout: float) -> None:
        try:
            self._socket.settimeout(timeout)
            self._socket.sendall(data)  # its time-out is one deadline for all of it
        except OSError as error:
            raise SplitError(f"link: could not send {len(data)} bytes within {timeout:g} s: {error}") from error

    def read(self, size: int, timeout: float) -> bytes:
        deadline, got = time.monotonic() + timeout, bytearray()
        while len(got) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise SplitError(f"link: got {len(got)} of {size} bytes within {timeout:g} s")
            try:
                self._socket.settimeout(left)
                part = self._socket.recv(min(size - len(got), 2**20))
            except OSError as error:
                raise SplitError(f"link: got {len(got)} of {size} bytes within {timeout:g} s: {error}") from error
            if not part:
                raise SplitError(f"link: the other side closed after {len(got)} of {size} bytes")
            got += part
        return bytes(got)

    def close(self) -> None:
        self._socket.close()


class GlooLink:
    """torch.distributed between two processes: rank 0 keeps the meeting place, rank 1 joins it.

    Args:
        rank: 0 or 1, one each.
        port: of the meeting place (a TCPStore). The messages themselves go over ports that gloo picks.
        host: interface, loopback by default; nothing listens on any other.
        timeout: seconds that both have to appear in.
        listening: rank 0 may give a bound and listening socket in place of `port`, so that no other program takes the port
            in between.

    Sends bytes as uint8 tensors: none of torch.distributed's object calls, which unpickle, is used.
    """

    def __init__(
        self,
        rank: int,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        timeout: float = 30.0,
        listening: socket.socket | None = None,
    ) -> None:
        if rank not in (0, 1):
            raise SplitError(f"link: rank must be 0 or 1, got {rank}")
        import torch.distributed

        distributed: Any = torch.distributed
        if not distributed.is_available() or not distributed.is_gloo_available():
            raise SplitError("link: this torch has no gloo; use TcpLink")
        self._peer = 1 - rank
        within = timedelta(seconds=timeout)
        if rank == 0 and listening is None:
            # Without a socket of ours the store would listen on every interface.
            listening = socket.create_server((host, port), backlog=2)
        try:
            if listening is None:
                store = distributed.TCPStore(host, port, 2, False, within)
            else:
                port = listening.getsockname()[1]
                store = distributed.TCPStore(
                    host, port, 2, True, within, wait_for_workers=False, master_listen_fd=listening.detach()
                )
            options = distributed.ProcessGroupGloo._Options()
            options._timeout = within
            options._devices = [distributed.ProcessGroupGloo.create_device(hostname=host)]
            self._group: Any = distributed.ProcessGroupGloo(distributed.PrefixStore("dyndepth.split", store), rank, 2, options)
            self._store: Any = store
        except RuntimeError as error:
            raise SplitError(f"link: the other process did not come to {host}:{port} within {timeout:g} s: {error}") from error

    def write(self, data: bytes, timeout: float) -> None:
        self._wait(lambda group: group.send([_tensor(data)], self._peer, 0), timeout, f"send {len(data)} bytes")

    def read(self, size: int, timeout: float) -> bytes:
        # gloo tells nobody how much came: what a short message leaves unwritten stays zero, and the checksum finds it.
        buffer = torch.zeros(size, dtype=torch.uint8)
        self._wait(lambda group: group.recv([buffer], self._peer, 0), timeout, f"get {size} bytes")
        return buffer.numpy().tobytes()

    def _wait(self, start: Any, timeout: float, what: str) -> None:
        if self._group is None:
            raise SplitError(f"link: could not {what}: the link is closed")
        try:
            start(self._group).wait(timedelta(seconds=timeout))
        except RuntimeError as error:
            raise SplitError(f"link: could not {what} within {timeout:g} s: {error}") from error

    def close(self) -> None:
        self._group = self._store = None


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
