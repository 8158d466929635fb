"""Messages between rank 0 and a worker: JSON with raw tensor bytes behind it, over a socket whose two ends proved that
they know the group's secret.

  channel = connect(address, secret)                    # a worker
  channel = welcome(accepted_socket, secret)            # rank 0
  channel.send({"do": "load", ...}, [tensor, ...]);  message, tensors = channel.receive()

Nothing is unpickled, ever, and nothing but 96 bytes of fixed size is read from a peer before it is known. The proof:
each side sends a nonce and then HMAC-SHA256(secret, own role, both nonces). The content is not encrypted: between
hosts, use a network that you trust (the tensors of NCCL are not encrypted either). Needs the standard library alone
until a tensor is sent, because a worker reports before it imports torch.
"""

import hashlib
import hmac
import json
import os
import socket
import struct
import threading

GREETING = b"flux2-attention ranks 1\n".ljust(32)
SERVER, CLIENT = b"rank 0", b"worker"
LONGEST_HEADER = 64 * 2**20
SIZES = struct.Struct(">QQ")  # bytes of the header, bytes of the tensors


class Closed(ConnectionError):
    """The other end is gone."""


class Stranger(ConnectionError):
    """The other end does not know the secret, or does not speak this protocol."""


class Channel:
    """One authenticated connection. `send` may be called from any thread, `receive` from one."""

    def __init__(self, sock):
        self.socket = sock
        self._sending = threading.Lock()

    def send(self, message, tensors=()):
        """message: anything JSON takes. tensors: of any device and dtype; they arrive on the CPU. Closed when the other
        end is gone.
        """
        parts = [to_bytes(tensor) for tensor in tensors]
        header = json.dumps({"message": message, "tensors": [description(tensor) for tensor in tensors]}).encode()
        with self._sending:
            try:
                self.socket.sendall(SIZES.pack(len(header), sum(len(part) for part in parts)) + header)
                for part in parts:
                    self.socket.sendall(part)
            except OSError as error:
                raise Closed(f"The connection is gone: {error}") from error

    def receive(self):
        """(message, tensors) of the next message, waiting for it. Closed when there will be none."""
        length, _ = SIZES.unpack(exactly(self.socket, SIZES.size))
        if length > LONGEST_HEADER:
            raise Closed(f"A message announced a header of {length} bytes: the connection is out of step.")
        header = json.loads(exactly(self.socket, length))
        return header["message"], [from_bytes(self.socket, *kind) for kind in header["tensors"]]

    def close(self):
        # shutdown wakes a thread that is receiving
        for finish in (lambda: self.socket.shutdown(socket.SHUT_RDWR), self.socket.close):
            try:
                finish()
            except OSError:
                pass


# --- tensors ---------------------------------------------------------------------------------------------------------


def description(tensor):
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def to_bytes(tensor):
    """The bytes of a tensor, as a memoryview; without a copy where it lies on the CPU in one piece."""
    import torch

    return (
        memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        if tensor.numel()
        else memoryview(b"")
    )


def from_bytes(sock, dtype, shape):
    import torch

    empty = torch.empty(shape, dtype=getattr(torch, dtype))
    if empty.numel():
        fill(sock, memoryview(empty.reshape(-1).view(torch.uint8).numpy()))
    return empty


# --- the connection --------------------------------------------------------------------------------------------------


def connect(address, secret, timeout=20):
    """A worker's Channel to rank 0 at (host, port). OSError when nobody listens, Stranger when it is somebody else."""
    sock = socket.create_connection(address, timeout=timeout)
    return prove(sock, secret, CLIENT, SERVER, timeout)


def welcome(sock, secret, timeout=10):
    """Rank 0's Channel on an accepted socket. Stranger when the peer does not know the secret or says nothing for
    `timeout` seconds.
    """
    return prove(sock, secret, SERVER, CLIENT, timeout)


def prove(sock, secret, own, other, timeout):
    """The handshake, the same on both sides. Returns the Channel; closes the socket and raises Stranger when it
    fails.
    """
    try:
        sock.settimeout(timeout)
        nonce = os.urandom(32)
        sock.sendall(GREETING + nonce)
        theirs = exactly(sock, 64)
        if theirs[:32] != GREETING:
            raise Stranger("The other end does not speak this protocol, or another version of it.")
        nonces = {own: nonce, other: theirs[32:]}
        sock.sendall(proof(secret, own, nonces))
        if not hmac.compare_digest(exactly(sock, 32), proof(secret, other, nonces)):
            raise Stranger("The other end does not know the secret of this group.")
        sock.settimeout(None)
        keep_alive(sock)
        return Channel(sock)
    except OSError as error:
        sock.close()
        raise (
            error
            if isinstance(error, Stranger)
            else Stranger(f"The other end did not prove that it belongs to this group: {error}")
        ) from error


def proof(secret, role, nonces):
    return hmac.new(
        secret.encode(), role + b"".join(nonces[side] for side in (SERVER, CLIENT)), hashlib.sha256
    ).digest()


def keep_alive(sock):
    """Notice within ten seconds that another host is gone, also while something is on its way there; a dead process is
    noticed at once.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", 3),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 10_000),
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def exactly(sock, size):
    """`size` bytes. Closed when the connection ends before."""
    data = bytearray(size)
    fill(sock, memoryview(data))
    return bytes(data)


def fill(sock, view):
    while view:
        try:
            got = sock.recv_into(view)
        except TimeoutError:
            raise Closed("nothing came in time") from None
        except OSError as error:
            raise Closed(f"The connection is gone: {error}") from error
        if not got:
            raise Closed("The other end closed the connection.")
        view = view[got:]
