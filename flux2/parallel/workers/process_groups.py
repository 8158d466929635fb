"""Process groups of our own, made from a torch.distributed store without its default group, and ended while they are in
use.

  store = hosted_store()                      # rank 0; others: joined_store(host, port)
  groups = ProcessGroups(store, prefix, rank, device)
  group = groups.make("all", [0, 1, 2, 3])    # every rank of the list calls this; works as group= of
                                              torch.distributed's functions
  groups.end()                                # from any thread: what waits in these groups comes back, with an error or
                                              with garbage

torch.distributed's default group may belong to another pack in the same ComfyUI, and ending it would end theirs. A
prefix is used once: after `end` the ranks agree on the next one. What ends a wait: NCCL's abort; on the CPU gloo has
none (torch 2.11: abort returns and changes nothing), but its connections close when one side drops its group, and then
the other side's wait fails. A host that is cut off closes nothing: its connections are given up by the system
(keep_alive), and the mesh asks its `abort` while it waits.
"""

from contextlib import contextmanager
from datetime import timedelta
import os
import socket
import threading

import torch
import torch.distributed as dist

from . import channel

JOINING = timedelta(seconds=120)  # for the first exchange of a group: ranks may come late, their GPU busy
LONGEST = timedelta(hours=2)  # an exchange; a dead rank is noticed in other ways
# NCCL's watchdog ends the whole process when a rank is gone. The process is ComfyUI, and group.py notices by itself.
WATCHDOG = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
}


def unavailable(device_type):
    """Why tensors on such devices cannot be exchanged with this PyTorch, a sentence, or None."""
    if not dist.is_available():
        return "This PyTorch was built without torch.distributed, which several ranks need."
    if device_type == "cuda" and not dist.is_nccl_available():
        return (
            "This PyTorch has no NCCL (or RCCL), which GPUs exchange data with: builds for Windows lack it. Use "
            "Linux for several GPUs."
        )
    if device_type == "cpu" and not dist.is_gloo_available():
        return "This PyTorch has no gloo, which ranks on the CPU exchange data with."
    return None


def hosted_store(host="127.0.0.1"):
    """The TCPStore of rank 0, listening on `host` only. torch by itself would listen on every interface."""
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.bind((host, 0))
    listening.listen(128)
    port = listening.getsockname()[1]
    return dist.TCPStore(
        host, port, None, True, timeout=JOINING, wait_for_workers=False, master_listen_fd=listening.detach()
    )


def joined_store(host, port):
    return dist.TCPStore(host, port, None, False, timeout=JOINING)


class ProcessGroups:
    """The process groups of one rank under one prefix. device: torch.device of the tensors; NCCL for GPUs, gloo on the
    CPU.

    host: this rank's address for the others; the loopback address keeps gloo on this machine.
    """

    def __init__(self, store, prefix, rank, device, host="127.0.0.1"):
        self.store, self.prefix, self.rank, self.device, self.host = (
            dist.PrefixStore(prefix, store),
            prefix,
            rank,
            torch.device(device),
            host,
        )
        self.ended = False
        self._made = []

    def make(self, name, ranks):
        """The ProcessGroup of `ranks` (this one among them), or None when this rank is not or would be alone. Group
        ranks follow the order of `ranks`.
        """
        if self.rank not in ranks or len(ranks) < 2:
            return None
        if self.ended:
            raise RuntimeError("These process groups were ended.")
        store, place = dist.PrefixStore(name, self.store), (list(ranks).index(self.rank), len(ranks))
        group = dist.ProcessGroup(store, *place)
        kind, backend = (self._nccl if self.device.type == "cuda" else self._gloo)(store, *place)
        group._set_default_backend(kind)
        group._register_backend(torch.device(self.device.type), kind, backend)
        self._made.append((group, backend))
        return group

    def _nccl(self, store, rank, size):
        options = dist.ProcessGroupNCCL.Options()
        options.is_high_priority_stream = False
        options._timeout = LONGEST
        with environment({**WATCHDOG, **self._interface("NCCL_SOCKET_IFNAME")}):
            backend = dist.ProcessGroupNCCL(store, rank, size, options)
            backend._set_sequence_number_for_group()
            with torch.cuda.device(self.device):
                # connects now, while the environment holds, and where a failure has a place to be told
                backend.allreduce([torch.zeros(1, device=self.device)]).wait()
                torch.cuda.synchronize(self.device)
        return dist.ProcessGroup.BackendType.NCCL, backend

    def _gloo(self, store, rank, size):
        options = dist.ProcessGroupGloo._Options()
        options._timeout = LONGEST
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.host)]
        before = connections_at(self.host)
        backend = dist.ProcessGroupGloo(store, rank, size, options)
        for descriptor in connections_at(self.host) - before:  # gloo waits for a host that is gone until its timeout
            with opened(descriptor) as connection:
                channel.keep_alive(connection)
        backend._set_sequence_number_for_group()
        return dist.ProcessGroup.BackendType.GLOO, backend

    def _interface(self, name):
        """Keep NCCL's own connections on this machine too, unless hosts were given or the user chose an interface."""
        return (
            {name: "lo"}
            if self.host == "127.0.0.1" and name not in os.environ and os.path.isdir("/sys/class/net/lo")
            else {}
        )

    def end(self):
        """End every group. Returns at once; GPU work that waited goes on within a second, and a wait on the CPU when
        its mesh hears of it.
        """
        self.ended, made, self._made = True, self._made, []
        threading.Thread(target=finish, args=(made,), name="flux2 ranks: ending groups", daemon=True).start()


def finish(made):
    """Abort NCCL groups, then drop all: dropping a gloo group waits for its pending exchanges, so this has a thread of
    its own.
    """
    for _, backend in made:
        if isinstance(backend, getattr(dist, "ProcessGroupNCCL", ())):
            threading.Thread(target=backend.abort, name="flux2 ranks: aborting NCCL", daemon=True).start()
    while made:
        made.pop()


def connections_at(host):
    """Descriptors of this process's connections from `host`, its address for other machines; none at the loopback
    address, where nobody is cut off.
    """
    if host == "127.0.0.1" or not os.path.isdir("/proc/self/fd"):
        return set()
    return {int(name) for name in os.listdir("/proc/self/fd") if connected_from(int(name), host)}


def connected_from(descriptor, host):
    try:
        with opened(descriptor) as connection:
            return bool(connection.getsockname()[0] == host and connection.getpeername())
    except (OSError, IndexError, TypeError):  # no socket, closed meanwhile, not connected, or of another family
        return False


def opened(descriptor):
    """A socket object of its own for a descriptor, which stays open. OSError when it is no socket."""
    own = os.dup(descriptor)
    try:
        return socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise


@contextmanager
def environment(values):
    """os.environ with some values while the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
