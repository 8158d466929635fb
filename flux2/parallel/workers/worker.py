"""A worker process: one rank with its own GPU and its own copy of the model. Started from this file, by rank 0 or, on
another host, by torchrun:

  FLUX2_RANKS_SECRET=... torchrun --standalone --nproc-per-node 8 flux2/parallel/workers/worker.py --join 10.0.0.1:29511
  [--comfyui PATH]

It connects to rank 0 (the ComfyUI process), proves that it knows the secret, and does what it is told until the
connection ends; a worker that joined from another host then starts afresh and waits for the next group. The socket has
a thread of its own, so that "stop what you compute" arrives while the main thread is inside an exchange. Environment:
RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT as torchrun sets them; FLUX2_RANKS_SECRET.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import os
from pathlib import Path
import queue
import signal
import socket
import sys
import threading
import time
import traceback
import types
import weakref

PACK = Path(__file__).resolve().parents[3]
ALIAS = "flux2_pack"
SECRET = "FLUX2_RANKS_SECRET"
RETRY_SECONDS = 2
ALIVE_SECONDS = 5  # between words to rank 0 that this process runs; rank 0 waits for 45 (pool.SILENCE)


def import_pack():
    """The pack as `flux2_pack`, from the folder that this file lies in, whatever the folder is called."""
    # its modules are not top-level ones
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    module = types.ModuleType(ALIAS)
    module.__path__ = [str(PACK)]
    sys.modules[ALIAS] = module


def pack(name):
    return importlib.import_module(f"{ALIAS}.{name}")


def end_with_parent():
    """Linux: the process ends with the thread that started it, however that ends. Elsewhere the closed socket says
    so.
    """
    if sys.platform == "linux":
        # a worker that starts afresh (leave) asks for the parent of its first start: that one may have ended before the
        # signal is set again
        parent = int(os.environ.setdefault("FLUX2_RANKS_PARENT", str(os.getppid())))
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


class Worker:
    """What this rank holds: connection, replica, mesh. `serve` runs in the main thread, `listen` in its own."""

    def __init__(self, channel):
        self.channel, self.inbox = channel, queue.SimpleQueue()
        self.requests = pack("flux2.parallel.workers.rendezvous").Requests(channel and channel.send)
        self.replica = self.mesh = self.groups = self.step = None
        self.rank, self.device = 0, "cpu"
        self.running, self.stopped, self.lock = None, 0, threading.Lock()
        self.absent = False  # True where the others wait in collectives that this rank takes no part in

    # --- three threads

    def live(self):
        """Say that this process runs, also while the main thread computes."""
        while True:
            time.sleep(ALIVE_SECONDS)
            self.channel.send({"alive": True})

    def listen(self):
        """Receive until the connection ends, and end the process then: rank 0 is gone or has no use for it."""
        try:
            while True:
                message, tensors = self.channel.receive()
                if message["do"] == "stop":
                    break
                if message["do"] in AT_ONCE:
                    AT_ONCE[message["do"]](self, message)
                else:
                    self.inbox.put((message, tensors))
        finally:
            self.inbox.put((None, ()))
            leave()

    def serve(self):
        while True:
            message, tensors = self.inbox.get()
            if message is None:
                return
            kind, number = message["do"], message["number"]
            self.absent = False
            try:
                done = IN_TURN[kind](self, message, tensors) or {}
                self.channel.send({"done": kind, "number": number, **done})
            except BaseException as error:  # ComfyUI's interruption is no Exception
                self.channel.send({"failed": kind, "number": number, **self.account(error)})
                tidy(self.device)

    def account(self, error):
        """What went wrong, for rank 0: cause "memory", "interrupted", "exchange" or "error", and a text."""
        name = type(error).__name__
        text = f"{name}: {error}"
        cause = {"InterruptProcessingException": "interrupted", "RanksLost": "exchange", "Interrupted": "exchange"}.get(
            name, "error"
        )
        if name == "OutOfMemoryError" or any(
            words in str(error).lower() for words in ("out of memory", "can't allocate memory")
        ):
            cause, text = "memory", memory_of(self.device)
        elif isinstance(error, (ValueError, NotImplementedError)) and str(error):
            text = str(error)
        if cause == "error":
            traceback.print_exc()
        return {"cause": cause, "text": text, "broken": self.absent or getattr(self.mesh, "broken", None) is not None}

    def inside(self, error):
        """The pass raised where this rank takes part in what is left of it with zeros: the others come to its end."""
        self.absent = False

    def interrupt(self, message):
        """Stop computing forward pass `number`, if that is what this rank is doing or will do next."""
        with self.lock:
            self.stopped = message["number"]
            self._heed()

    def _heed(self):
        if self.running == self.stopped:
            import comfy.model_management

            comfy.model_management.interrupt_current_processing(True)

    def end(self, message):
        """End what waits in the process groups."""
        if self.groups is not None:
            self.end_mesh()

    def end_mesh(self):
        groups, self.groups = self.groups, None
        if self.mesh is not None:
            self.mesh.end()
        groups.end()
        self.mesh = self.step = None

    # --- what rank 0 asks for

    def do_configure(self, message, tensors):
        """Import torch and ComfyUI with rank 0's settings. Returns versions and device."""
        self.rank = message["rank"]
        comfyui = comfyui_folder(message["comfyui"])
        sys.path.insert(0, comfyui)
        import comfy.options

        comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args, PerformanceFeature

        vars(args).update(message["arguments"], fast={PerformanceFeature(name) for name in message["fast"]})
        import torch

        self.device = torch.device("cuda", 0) if message["device"] == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        pack("flux2.parallel.workers.replica")
        pack("attention.dispatch").use_tuner(
            pack("flux2.parallel.workers.kernel_choice").FollowingTuner(self.ask_kernel)
        )
        facts = pack("flux2.parallel.workers.versions")
        return {"versions": facts.versions(), "name": facts.device_name(self.device)}

    def ask_kernel(self, request):
        """Which kernel rank 0 takes; a cancel is heard meanwhile."""
        from comfy.model_management import throw_exception_if_processing_interrupted

        return self.requests.ask(330, {"request": "kernel", **request}, throw_exception_if_processing_interrupted)

    def do_load(self, message, tensors):
        self.replica = None
        tidy(self.device)
        begun = time.perf_counter()
        self.replica = pack("flux2.parallel.workers.replica").Replica(message["source"], self.device, self.rank)
        self.tensors = {}
        return {
            "seconds": time.perf_counter() - begun,
            "bytes": self.replica.bytes,
            "digest": self.replica.digest,
        }

    def do_mesh(self, message, tensors):
        groups = pack("flux2.parallel.workers.process_groups")
        if self.groups is not None:
            self.end_mesh()
        store = groups.WorkerStore(self.requests)
        self.groups = groups.ProcessGroups(store, message["prefix"], self.rank, self.device, message["host"])
        self.mesh = pack("attention.parallel").make_mesh(
            **message["mesh"],
            device=self.device,
            rank=self.rank,
            size=message["size"],
            groups=self.groups.make,
            stores=self.groups.shared_store,
        )
        fallback = pack("flux2.parallel.attention").ring_fallback()
        self.step = pack("flux2.parallel.workers.step").StepExchange(self.mesh, fallback)

    def do_weights(self, message, tensors):
        """tensors: those of message["new"]; the others this rank has from before."""
        self.tensors.update(zip(message["new"], tensors))
        self.tensors = {number: self.tensors[number] for number in message["numbers"]}
        return {
            "patched": self.replica.set_weights(
                message["patches"], [self.tensors[number] for number in message["numbers"]]
            )
        }

    def do_options(self, message, tensors):
        self.replica.set_options(message["specs"])

    def do_forward(self, message, tensors):
        import torch

        self.absent = True  # whoever fails before or after the collectives leaves the others waiting in them
        with self.interruptible(message["number"]), torch.inference_mode():
            inputs = self.step.receive(message["inputs"], message["kinds"])
            options = self.replica.options()
            with (
                self.at_moment(options, message["moment"]),
                self.step.installed(self.replica.network, failed=self.inside),
            ):
                self.replica.network(**inputs, transformer_options=options)
        self.absent = False

    def do_finish(self, message, tensors):
        """The end of a sampling. Returns this rank's times and what computed its attention."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)
        self.replica.sampled()
        times = {}
        if self.mesh is not None:
            times = self.mesh.stats.read().as_data()
            self.mesh.stats.reset()
        return {"times": times, "attention": self.ran()}

    def do_room(self, message, tensors):
        """Bytes of this rank's GPU that are free, and all; None on the CPU."""
        import torch

        free, total = torch.cuda.mem_get_info(self.device) if self.device.type == "cuda" else (None, None)
        return {"free": free, "total": total}

    def do_drop(self, message, tensors):
        """Give the GPU's memory back; the process stays. Says whether nothing holds the model any more."""
        network = weakref.ref(self.replica.network) if self.replica is not None else lambda: None
        self.replica = self.step = None
        if self.groups is not None:
            self.end_mesh()
        tidy(self.device)
        return {"freed": network() is None}

    @contextlib.contextmanager
    def interruptible(self, number):
        with self.lock:
            self.running = number
            self._heed()
        try:
            yield
        finally:
            with self.lock:
                self.running = None
                import comfy.model_management

                comfy.model_management.interrupt_current_processing(False)

    def at_moment(self, options, moment):
        """Tell the Select Attention that rank 0 has, and this rank too, where in the sampling this pass is."""
        dispatcher = self.dispatcher(options)
        return dispatcher.forward(*moment) if dispatcher is not None else contextlib.nullcontext()

    def dispatcher(self, options):
        slot = pack("flux2.attention_slot")
        return slot.dispatcher_behind(options.get(slot.SLOT))

    def ran(self):
        """What computed the attention of the last sampling: {backend: calls}."""
        dispatcher = self.dispatcher(self.replica.options())
        if dispatcher is None or dispatcher.log.current is None:
            return {}
        found = {}
        for entry in dispatcher.log.current.kinds():
            found[entry.backend] = found.get(entry.backend, 0) + entry.calls
        dispatcher.begin_run(0)
        return found


# What rank 0 may ask for. At once: by the thread that receives; in turn: by the main thread, and answered.
AT_ONCE = {
    "interrupt": Worker.interrupt,
    "end": Worker.end,
    "answer": lambda worker, message: worker.requests.receive(message),
}
IN_TURN = {
    "configure": Worker.do_configure,
    "load": Worker.do_load,
    "mesh": Worker.do_mesh,
    "weights": Worker.do_weights,
    "options": Worker.do_options,
    "forward": Worker.do_forward,
    "finish": Worker.do_finish,
    "room": Worker.do_room,
    "drop": Worker.do_drop,
}

# --- small things -----------------------------------------------------------------------------------------------------


def tidy(device):
    """Give memory of dropped tensors back to the GPU."""
    gc.collect()
    if str(device).startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def memory_of(device):
    if str(device) == "cpu":
        return "host memory ran out"
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return f"GPU memory ran out: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free now, after giving back what could be"


def comfyui_folder(told):
    """ComfyUI on this machine: that of rank 0 for its own workers; on another host --comfyui, COMFYUI_PATH, or the
    folder that this pack is installed in, and never one that is told over the network: its code will run.
    """
    own = (options().comfyui, os.environ.get("COMFYUI_PATH"), *PACK.parents[1:2])
    for place in own if options().join else (told,):
        if place and (Path(place) / "comfy" / "sd.py").is_file():
            return str(Path(place).resolve())
    raise ValueError(
        f"There is no ComfyUI on {socket.gethostname()} beside this pack. Start the worker with --comfyui FOLDER."
    )


def leave():
    """End this process. A worker from another host starts afresh in its place, for the next group; its id and
    torchrun's watch stay.
    """
    sys.stdout.flush()
    if options().join:
        os.execv(sys.executable, [sys.executable, *sys.argv])
    os._exit(0)


def options():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--join",
        metavar="HOST:PORT",
        help="join rank 0 on another host; without it MASTER_ADDR and MASTER_PORT say where it is",
    )
    parser.add_argument(
        "--comfyui", metavar="FOLDER", help="ComfyUI on this host, if this pack does not lie in its custom_nodes folder"
    )
    return parser.parse_args()


def see_one_gpu():
    """Under torchrun every worker sees all GPUs of the host: keep the one of LOCAL_RANK. Rank 0 has done it for workers
    of its own.
    """
    index = int(os.environ.get("LOCAL_RANK", "0"))
    # kept for a start afresh (leave), which finds what is set here in the place of the host's own selection
    chosen = os.environ.setdefault("FLUX2_RANKS_GPU", pack("flux2.parallel.workers.launch").visible(index))
    os.environ.update(CUDA_VISIBLE_DEVICES=chosen, HIP_VISIBLE_DEVICES=chosen)


def address():
    where = options().join or f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '')}"
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise SystemExit(f"worker: '{where}' is not HOST:PORT.")
    return host, int(port)


def connected(protocol, secret):
    """The Channel to rank 0. From another host: keep trying, rank 0 listens when a prompt needs it."""
    told = False
    while True:
        try:
            return protocol.connect(address(), secret)
        except OSError as error:
            if not options().join:
                raise SystemExit(f"worker: rank 0 at {address()} cannot be joined: {error}") from None
            if not told:
                print(f"worker: waiting for rank 0 at {options().join} ({error})", flush=True)
            told = True
            time.sleep(RETRY_SECONDS)


def main():
    import_pack()
    if options().join:
        os.environ["FLUX2_RANKS_JOINED"] = "1"
        see_one_gpu()
    # torchrun is the parent; a shell may go and leave a worker behind
    if not options().join or "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    secret = os.environ.get(SECRET)
    if not secret:
        raise SystemExit(f"worker: {SECRET} is not set. It is the secret of the group that this worker should join.")
    protocol = pack("flux2.parallel.workers.channel")
    worker = Worker(connected(protocol, secret))
    worker.channel.send(
        {
            "is": "here",
            "rank": None if options().join else int(os.environ["RANK"]),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        }
    )
    for work, name in ((worker.listen, "rank 0's messages"), (worker.live, "alive")):
        threading.Thread(target=work, name=name, daemon=True).start()
    try:
        worker.serve()
    except protocol.Closed:
        leave()


if __name__ == "__main__":
    main()
