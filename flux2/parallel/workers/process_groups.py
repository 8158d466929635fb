"""Process groups of our own, made without torch.distributed's default group, and ended while they are in use.

  store = RankZeroStore(rendezvous)           # rank 0; others: WorkerStore(requests); see rendezvous.py
  groups = ProcessGroups(store, prefix, rank, device, host)
  group = groups.make("all", [0, 1, 2, 3])    # every rank of the list calls this; works as group= of
                                              torch.distributed's functions
  groups.end()                                # from any thread: what waits in these groups comes back, with an error or
                                              with garbage
  wait_until_ended(seconds)                   # before the process ends: groups may not end together with it

torch.distributed's default group may belong to another pack in the same ComfyUI, and ending it would end theirs. A
prefix is used once: after `end` the ranks agree on the next one. What ends a wait: NCCL's abort; on the CPU gloo has
none (torch 2.11: abort returns and changes nothing), but its connections close when one side drops its group, and then
the other side's wait fails. A host that is cut off closes nothing: its connections are given up by the system
(keep_alive), and the mesh asks its `abort` while it waits.
"""

import base64
from contextlib import contextmanager
from datetime import timedelta
import os
import socket
import threading
import time

import torch
import torch.distributed as dist

from . import channel

JOINING = timedelta(seconds=120)  # for the first exchange of a group: ranks may come late, their GPU busy
LONGEST = timedelta(hours=2)  # an exchange; a dead rank is noticed in other ways
# NCCL's watchdog ends the whole process when a rank is gone. The process is ComfyUI, and pool.py notices by itself.
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
        library = "RCCL" if torch.version.hip else "NCCL"
        return (
            f"This PyTorch has no {library}, which GPUs exchange data with: builds for Windows lack it. Use Linux for "
            "several GPUs."
        )
    if device_type == "cpu" and not dist.is_gloo_available():
        return "This PyTorch has no gloo, which ranks on the CPU exchange data with."
    return None


class RankZeroStore(getattr(dist, "Store", object)):
    """torch's interface of a store over rank 0's own values (rendezvous.Rendezvous)."""

    def __init__(self, values):
        super().__init__()
        self.values = values

    def set(self, key, value):
        self.values.set(key, value if isinstance(value, bytes) else value.encode())

    def get(self, key):
        self.wait([key])
        return self.values.values[key]

    def add(self, key, amount):
        return self.values.add(key, amount)

    def check(self, keys):
        return self.values.check(keys)

    def wait(self, keys, timeout=JOINING):
        if not self.values.wait(keys, timeout.total_seconds()):
            raise RuntimeError(f"Another rank did not connect within {timeout.total_seconds():g} seconds.")

    def clone(self):
        """torch asks for one per thread; this one may be used by any."""
        return self


class WorkerStore(getattr(dist, "Store", object)):
    """The same on a worker, which asks rank 0. requests: rendezvous.Requests."""

    def __init__(self, requests):
        super().__init__()
        self.requests = requests

    def _ask(self, kind, timeout=JOINING, **content):
        return self.requests.ask(timeout.total_seconds() + 10, {"request": kind, **content})

    def set(self, key, value):
        value = value if isinstance(value, bytes) else value.encode()
        self._ask("set", key=key, value=base64.b64encode(value).decode())

    def get(self, key):
        self.wait([key])
        return base64.b64decode(self._ask("get", key=key))

    def add(self, key, amount):
        return self._ask("add", key=key, value=amount)

    def check(self, keys):
        return self._ask("check", keys=list(keys))

    def wait(self, keys, timeout=JOINING):
        seconds = timeout.total_seconds()
        if not self._ask("wait", timeout, keys=list(keys), seconds=seconds):
            raise RuntimeError(f"Another rank did not connect within {seconds:g} seconds.")

    def clone(self):
        return self


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
        # PyTorch calls its methods as long as a store of this one is used, and does not keep the Python object
        self._shared = store
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

    def shared_store(self, name):
        """A torch.distributed Store that all ranks share, under a name that is used once."""
        return dist.PrefixStore(name, self.store)

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
        """Keep NCCL's own connections on the interface of `host`, unless the user chose one."""
        found = interface_of(self.host)
        return {name: f"={found}"} if found and name not in os.environ else {}

    def end(self):
        """End every group. Returns at once; GPU work that waited goes on within a second, and a wait on the CPU when
        its mesh hears of it.
        """
        self.ended, made, self._made = True, self._made, []
        thread = threading.Thread(target=end_groups, args=(made,), name="flux2 ranks: ending groups", daemon=True)
        _ending.append(thread)
        thread.start()


_ending = []  # threads in which groups end


def end_groups(made):
    """Abort NCCL groups, all at the same time, then drop all groups: dropping a gloo group waits for its pending
    collectives, so this has a thread of its own.
    """
    nccl = getattr(dist, "ProcessGroupNCCL", ())
    aborts = [
        threading.Thread(target=backend.abort, name="flux2 ranks: aborting NCCL", daemon=True)
        for _, backend in made
        if isinstance(backend, nccl)
    ]
    for thread in aborts:
        thread.start()
    for thread in aborts:
        thread.join()
    made.clear()
    _ending.remove(threading.current_thread())


def wait_until_ended(seconds):
    """Wait for groups that are ending, so many seconds at most. A thread that is inside NCCL or gloo when the
    interpreter is torn down ends the whole process with "terminate called without an active exception".
    """
    deadline = time.monotonic() + seconds
    for thread in list(_ending):
        thread.join(max(0.0, deadline - time.monotonic()))


def interface_of(host):
    """The name of the network interface that has an IPv4 address; None where the system does not tell."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, name.encode()[:15].ljust(256, b"\0"))  # SIOCGIFADDR
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == host:
                return name
    return None


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
