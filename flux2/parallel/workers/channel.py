"""Messages between rank 0 and a worker: JSON with raw tensor bytes behind it, over a socket whose two ends proved that
they know the session's secret, and on which every byte is authenticated.

  channel = connect(address, secret)                    # a worker
  channel = accept(accepted_socket, secret)             # rank 0
  channel.send({"do": "load", ...}, [tensor, ...]);  message, tensors = channel.receive()

The proof: each side sends a nonce and then HMAC-SHA256(secret, own role, both nonces). From the secret and both nonces
each direction gets a key of its own, and every frame (a header, then each tensor) carries HMAC-SHA256(key, its number
in this direction, its length, its bytes). So nothing can be injected, changed, repeated, left out, reordered or sent
back without the receiver closing the connection; whoever only relays the bytes can do no more than stop them. The
content is not encrypted. Nothing is unpickled, ever; 96 bytes of fixed size are read from a peer before it is known,
within one deadline. Needs the standard library alone until a tensor is sent, because a worker reports before it imports
torch.

Why not multiprocessing.connection: it proves a key when a connection is made (with MD5 before Python 3.12) and
authenticates no message afterwards. Why not TLS with a pre-shared key: Python has it from 3.13 on, and a worker runs in
ComfyUI's own Python.
"""

import hashlib
import hmac
import json
import os
import socket
import struct
import threading
import time

GREETING = b"flux2-attention ranks 2\n".ljust(32)
SERVER, CLIENT = b"rank 0", b"worker"
OTHER = {SERVER: CLIENT, CLIENT: SERVER}
LONGEST_HEADER = 64 * 2**20  # bytes; an answer to rank 0 is far shorter, see `longest`
LENGTH = struct.Struct(">Q")  # bytes of the header
PLACE = struct.Struct(">QQ")  # number of the frame, bytes of the frame
TAG = hashlib.sha256().digest_size


class Closed(ConnectionError):
    """The other end is gone, or what arrived is not what it sent."""


class Stranger(ConnectionError):
    """The other end does not know the secret, or does not speak this protocol."""


class Channel:
    """One authenticated connection. role: SERVER or CLIENT. key: of this connection. longest: bytes of a header that
    are received. `send` may be called from any thread, `receive` from one.
    """

    def __init__(self, sock, role, key, longest=LONGEST_HEADER):
        self.socket, self.longest = sock, longest
        self._out, self._in = (Sealer(hmac.digest(key, one, "sha256")) for one in (role, OTHER[role]))
        self._sending = threading.Lock()

    def send(self, message, tensors=()):
        """message: anything JSON takes. tensors: of any device and dtype; they arrive on the CPU. Closed when the other
        end is gone; TypeError or ValueError, and nothing is sent, for what cannot be written down.
        """
        kinds = []
        if tensors:
            from . import dtypes

            kinds = [dtypes.kind_of(tensor) for tensor in tensors]
        header = json.dumps({"message": message, "tensors": kinds}).encode()
        with self._sending:
            try:
                self.socket.sendall(LENGTH.pack(len(header)) + header + self._out.tag(header))
                for tensor in tensors:
                    data = bytes_of(tensor)
                    self.socket.sendall(data)
                    self.socket.sendall(self._out.tag(data))
            except BaseException as error:  # half a message: nothing that follows could be understood
                self.close()
                if isinstance(error, OSError):
                    raise Closed(f"The connection is gone: {error}") from error
                raise

    def receive(self, timeout=None):
        """(message, tensors) of the next message, waiting for it, `timeout` seconds at most. Closed when there will be
        none, or when it is not what the other end sent.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        (length,) = LENGTH.unpack(exactly(self.socket, LENGTH.size, deadline))
        if length > self.longest:
            raise Closed(f"A message announced a header of {length} bytes: the connection is out of step.")
        header = exactly(self.socket, length, deadline)
        self._in.check(header, exactly(self.socket, TAG, deadline))
        try:
            header = json.loads(header)
            message, kinds = header["message"], header["tensors"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Closed(f"A message is not one of this protocol: {type(error).__name__}: {error}") from error
        return message, [self._tensor(kind) for kind in kinds]

    def _tensor(self, kind):
        from . import dtypes

        try:
            tensor = dtypes.empty(kind)
        except (ValueError, TypeError) as error:
            raise Closed(f"A message announced a tensor that cannot be received: {error}") from error
        data = bytes_of(tensor)
        fill(self.socket, data)
        self._in.check(data, exactly(self.socket, TAG))
        return tensor

    def close(self):
        # shutdown wakes a thread that is receiving
        for finish in (lambda: self.socket.shutdown(socket.SHUT_RDWR), self.socket.close):
            try:
                finish()
            except OSError:
                pass


class Sealer:
    """Tags of the frames of one direction, in their order."""

    def __init__(self, key):
        self.key, self.number = key, 0

    def tag(self, data):
        """The tag of the next frame."""
        sealed = hmac.new(self.key, PLACE.pack(self.number, len(data)), hashlib.sha256)
        sealed.update(data)
        self.number += 1
        return sealed.digest()

    def check(self, data, tag):
        """Closed unless `tag` is that of the next frame with these bytes."""
        if not hmac.compare_digest(self.tag(data), tag):
            raise Closed(
                "What arrived is not what the other end sent: something on the way changes, repeats or inserts data."
            )


def bytes_of(tensor):
    """The bytes of a tensor, as a memoryview; without a copy where it lies on the CPU in one piece."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


# --- the connection --------------------------------------------------------------------------------------------------


def connect(address, secret, timeout=20):
    """A worker's Channel to rank 0 at (host, port). OSError when nobody listens, Stranger when it is somebody else."""
    sock = socket.create_connection(address, timeout=timeout)
    return prove(sock, secret, CLIENT, timeout)


def accept(sock, secret, timeout=10, longest=LONGEST_HEADER):
    """Rank 0's Channel on an accepted socket. Stranger when the peer did not prove within `timeout` seconds that it
    knows the secret.
    """
    return prove(sock, secret, SERVER, timeout, longest)


def prove(sock, secret, role, timeout, longest=LONGEST_HEADER):
    """The handshake, the same on both sides. Returns the Channel; closes the socket and raises Stranger when it fails
    or is not over in `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    try:
        sock.settimeout(timeout)
        nonce = os.urandom(32)
        sock.sendall(GREETING + nonce)
        theirs = exactly(sock, 64, deadline)
        if theirs[:32] != GREETING:
            raise Stranger("The other end does not speak this protocol, or another version of it.")
        nonces = {role: nonce, OTHER[role]: theirs[32:]}
        sock.sendall(derived(secret, role, nonces))
        if not hmac.compare_digest(exactly(sock, TAG, deadline), derived(secret, OTHER[role], nonces)):
            raise Stranger("The other end does not know the secret of this session.")
        sock.settimeout(None)
        keep_alive(sock)
        return Channel(sock, role, derived(secret, b"key", nonces), longest)
    except OSError as error:
        sock.close()
        raise (
            error
            if isinstance(error, Stranger)
            else Stranger(f"The other end did not prove that it belongs to this session: {error}")
        ) from error


def derived(secret, purpose, nonces):
    """32 bytes that only who knows the secret can make: the proof of a role, or the key of a connection."""
    return hmac.digest(secret.encode(), purpose + b"".join(nonces[side] for side in (SERVER, CLIENT)), "sha256")


def keep_alive(sock):
    """Notice within ten seconds that another host is gone, also while something is being sent to it; a dead process is
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


def exactly(sock, size, deadline=None):
    """`size` bytes. Closed when the connection ends, or the deadline (time.monotonic) is over, before."""
    data = bytearray(size)
    fill(sock, memoryview(data), deadline)
    return bytes(data)


def fill(sock, view, deadline=None):
    """Receive into a memoryview until it is full."""
    while view:
        if deadline is not None:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            got = sock.recv_into(view)
        except TimeoutError:
            raise Closed("nothing came in time") from None
        except OSError as error:
            raise Closed(f"The connection is gone: {error}") from error
        if not got:
            raise Closed("The other end closed the connection.")
        view = view[got:]
    if deadline is not None:
        sock.settimeout(None)
