"""The other ranks of one loaded model, as rank 0 sees them: their state, the model on them, the mesh between all ranks,
and the forward passes that they share.

  session = session_of(base_model, plan)          # the one that is there, or a new one in place of one with other
                                                  processes
  session.prepare(patcher)                        # starts processes and loading in the background
  session.begin(patcher); session.ready(patcher)  # a sampling: what is missing is started, loaded and awaited
  session.update(patcher, options)                # LoRA and options of the other ranks, where they differ
  with session.forward(network, inputs, moment):
      ...                                         # rank 0's own pass
  session.finish(); session.at_rest()             # the end of a sampling: every rank's times are in session.last
  session.stop()

What a session does is its `state`, and TRANSITIONS holds every legal change. What a failure costs: a cancel, and a rank
that ran out of memory inside a pass, leave processes, replicas and mesh as they are (flux2/parallel). A rank that is
lost ends all of them; the next sampling starts anew, its weights coming from the system's file cache.
"""

import atexit
from contextlib import contextmanager
from dataclasses import dataclass
import logging
import secrets
import threading
import time
import weakref

import torch

from ....attention.parallel import make_mesh
from ..attention import ring_fallback
from . import ahead, launch, patch_transfer, process_groups, replica, versions
from .pool import RanksFailed, WorkerPool
from .session_state import TRANSITIONS, State, Transferred
from .step import StepExchange, describe_inputs

LOADING_S, CONNECTING_S, ACKNOWLEDGING_S, FINISHING_S = 3600, 150, 300, 600  # that ranks may take
STOPPING = 1.2  # seconds that the ranks may take to come to the end of a cancelled pass; then they are ended
ROOM = 1.25  # memory of a GPU that has to be free for a model, over its size: what a pass needs besides is part of that
GRACE = 30  # seconds from the moment that nobody needs the processes until they end
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Connection:
    """All ranks connected in one arrangement. arrangement: ParallelPlan.mesh() it was made for."""

    groups: process_groups.ProcessGroups
    mesh: object
    step: StepExchange
    arrangement: dict


def no_progress(text, done, of):
    """Progress that is shown nowhere."""


class ParallelSession:
    """See the module's text. base: ComfyUI's model (BaseModel), held weakly. seconds: from the start of the processes
    until they ran ("configure"), had loaded ("load"), were connected ("ready"). held: bytes of weights on each rank.
    last: what the last sampling reported, by rank. cancelled(): whether the user asked to stop. in_use(): whether
    rank 0 still has the model loaded. turn: held by whoever changes which model the ranks have.
    """

    def __init__(self, plan, device, cancelled=lambda: False, in_use=lambda: True):
        self.plan, self.device = plan, torch.device(device)
        self.cancelled, self.in_use = cancelled, in_use
        self.name = "this process", versions.device_name(self.device)
        self.state, self._changing = State.STOPPED, threading.RLock()
        self.pool, self.seconds, self.last, self.turn = None, {}, {}, threading.RLock()
        self._forget()
        _sessions.add(self)

    def _forget(self):
        """Nothing is known to be on the other ranks."""
        self.connection = None
        self._generation = 0  # of connections: each has names of its own in the store
        # the model that the ranks were asked to load, the number of that request, whether they have rank 0's weights
        self._source = self._load = None
        self._compared, self.held = False, {}
        self._transferred = Transferred()
        self._pass = self._asked_since = None  # number of the pass that runs, and since when the ranks are to end it
        self._idle_since, self._patience, self._seen_loaded = None, GRACE, False

    def _become(self, new, *only_from):
        """Change the state; with only_from, only out of one of these. Whether it changed. RuntimeError for a change
        that TRANSITIONS does not have.
        """
        with self._changing:
            if self.state is new or (only_from and self.state not in only_from):
                return False
            if new not in TRANSITIONS[self.state]:
                raise RuntimeError(f"A parallel session that is {self.state.value} cannot become {new.value}.")
            self.state = new
            return True

    @property
    def step(self):
        """The StepExchange of the connection, or None."""
        return self.connection and self.connection.step

    @property
    def mesh(self):
        return self.connection and self.connection.mesh

    @property
    def running(self):
        """Whether processes run or are being started."""
        return self.pool is not None and self.pool.started

    # --- from stopped to ready

    def start(self):
        """Start the processes, unless they run. Returns at once. OSError or ValueError when rank 0 cannot listen."""
        with self.turn:
            if self.running:
                return
            self.stop()  # what is left of those before
            self._forget()
            self.seconds, self._idle_since, self._patience = {}, time.perf_counter(), ahead.PREPARED_S
            self.pool = pool = ahead.taken_ahead(self.plan) or WorkerPool(self.plan)
            pool.plan, pool.look_after = self.plan, self._look_after
            pool.on_failure, pool.busy = lambda: self._ended(pool), lambda: self.state is State.SAMPLING
            if not pool.started:
                pool.start()
            self._become(State.STARTING, State.STOPPED)

    def prepare(self, patcher):
        """Start the processes and let them load the model, in the background: for a prompt whose sampler comes later.
        Raises replica.NotReplicable, OSError, ValueError; what fails later is told to that sampler.
        """
        replica.source_of(patcher)
        with self.turn:
            self.start()
            if self._idle_since is not None:
                self._idle_since, self._patience = time.perf_counter(), ahead.PREPARED_S
        if self._source is None:
            threading.Thread(
                target=self._load_softly, args=(patcher,), name="flux2 ranks: loading", daemon=True
            ).start()

    def _load_softly(self, patcher):
        try:
            self._start_loading(patcher, no_progress)
        except Exception as error:
            log.debug("Sequence parallel: the ranks do not load before the sampler asks them to: %s", error)

    def begin(self, patcher, progress=no_progress):
        """A sampling begins: every process is there and loads the model, or has it. Returns while they load, so that
        rank 0 can load at the same time.

        progress(text, how many are done, of how many) is called while this waits, here and in `ready`, and may raise (a
        cancel). Raises replica.NotReplicable, OSError, ValueError, RanksFailed.
        """
        replica.source_of(patcher)
        with self.turn:
            self.start()
            self._become(State.SAMPLING)
        self.load(patcher, progress)

    def load(self, patcher, progress=no_progress):
        """Let every rank load the model, unless they have it: `begin` for callers of single passes."""
        with self.turn:
            self.start()
            self._idle_since, self._seen_loaded = None, False
        self._start_loading(patcher, progress)

    def _start_loading(self, patcher, progress):
        source = replica.source_of(patcher)
        self._await("configure", 1, 660, "starting processes", progress)
        with self.turn:
            if source != self._source:
                self._make_room(replica.bytes_on_device(patcher))
                self._source, self._load = source, self.pool.ask("load", source=source)
                self._compared = False
                self._transferred = Transferred()
                self._become(State.LOADING, State.STARTING, State.READY, State.DRAINING)

    def _make_room(self, size):
        """Other models leave the other ranks' GPUs when this one, of `size` bytes, would not fit beside them. ComfyUI
        does the same for rank 0 a little later.
        """
        if self._short_of(size, ROOM):
            for other in list(_sessions):
                if other is not self:
                    other.drop(wait=True)
            short = self._short_of(size, 1)
            if short:
                raise RanksFailed(short)

    def _short_of(self, size, factor):
        """A sentence about a rank whose GPU has less than factor * size bytes free; "" when all have."""
        for rank, answer in sorted(self._answers("room", self.pool.ask("room")).items()):
            free, total = answer["free"], answer["total"]
            if free is not None and free < factor * size:
                worker = next(worker for worker in self.pool.workers if worker.rank == rank)
                what = "the model" if self.plan.tensor == 1 else "its share of the weights"
                there = f"{worker} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free, and {what} takes {size / 1e9:.1f}"
                if total < size:
                    return f"{there}: it does not fit on that GPU. Use an fp8 checkpoint, or GPUs with more memory."
                return (
                    f"{there}: another program uses that GPU. End it, or leave that GPU out with CUDA_VISIBLE_DEVICES "
                    "(HIP_VISIBLE_DEVICES on AMD) or fewer gpus."
                )
        return ""

    def ready(self, patcher, progress=no_progress):
        """Until every rank has this MODEL and all are connected. RanksFailed when one loaded other weights."""
        if self._load is None:
            raise RanksFailed("The other ranks have no model. The next prompt loads it again.")
        answers = self._await("load", self._load, LOADING_S, "loading the model", progress)
        self.held = {rank: answer["bytes"] for rank, answer in answers.items()}
        if patcher is not None:
            self.held[0] = replica.bytes_on_device(patcher)
        if patcher is not None and not self._compared:
            self._compare(answers, replica.digest_of(patcher))
        if self.connection is None or self.connection.arrangement != self.plan.mesh():
            self._connect(progress)
            self.seconds.setdefault("ready", time.perf_counter() - self.pool.began)
            progress("ready", self.plan.size - 1, self.plan.size - 1)
        self._become(State.READY, State.LOADING)

    def _compare(self, answers, digest):
        """RanksFailed unless every rank loaded the weights that rank 0 has."""
        others = [rank for rank, answer in sorted(answers.items()) if answer["digest"] != digest]
        if others:
            names = ", ".join(str(worker) for worker in self.pool.workers if worker.rank in others)
            arguments = self._source["arguments"]
            self._source = self._load = None
            raise RanksFailed(
                f"{names} loaded other weights than rank 0 from {arguments[0] if arguments else 'the same source'}: "
                "the file was changed after ComfyUI loaded it, or another host has another file of that name. Use the "
                "same file on every host, and restart ComfyUI after replacing one."
            )
        self._compared = True

    def _await(self, what, number, patience, text, progress):
        others = self.plan.size - 1
        answers = self.pool.done(what, number, patience, lambda waiting: progress(text, others - waiting, others))
        self.seconds.setdefault(what, time.perf_counter() - self.pool.began)
        return answers

    def _answers(self, what, number, patience=ACKNOWLEDGING_S):
        """What every rank answers; a cancel of the user is heard meanwhile."""

        def wait(waiting):
            if self.cancelled():
                raise RanksFailed("The prompt was cancelled.")

        return self.pool.done(what, number, patience, wait)

    def _connect(self, progress):
        """Process groups between all ranks, made by all of them at the same time. In a thread: a rank that dies
        meanwhile would hold this one up.
        """
        self.end_mesh()
        self._generation += 1
        far = next((worker for worker in self.pool.workers if worker.process is None), None)
        host = far.channel.socket.getsockname()[0] if far else launch.LOOPBACK
        # names of its own in the store
        prefix = f"{secrets.token_hex(16)}/{self._generation}"
        arrangement, size = self.plan.mesh(), self.plan.size
        number = self.pool.ask(
            "mesh",
            mesh=arrangement,
            size=size,
            prefix=prefix,
            each=lambda worker: {"host": worker.address if worker.process is None else host},
        )

        def own_side():
            store = process_groups.RankZeroStore(self.pool.store)
            groups = process_groups.ProcessGroups(store, prefix, 0, self.device, host)
            ways = {"groups": groups.make, "stores": groups.shared_store}
            return groups, make_mesh(**arrangement, device=self.device, rank=0, size=size, **ways)

        with BackgroundResult(own_side, unwanted=lambda made: made[0].end()) as made:
            self._await("mesh", number, CONNECTING_S, "connecting", progress)
            groups, mesh = made.result(self.pool.check)
        self.connection = Connection(groups, mesh, StepExchange(mesh, ring_fallback()), arrangement)

    def end_mesh(self):
        """End what waits in the mesh, from any thread. The next pass needs a new one."""
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.mesh.end()
            connection.groups.end()
            self.pool.store.forget()

    def _ended(self, pool):
        """By the pool, from any thread: its processes cannot be waited for any more."""
        if pool is self.pool:
            self._stopped()
            self.end_mesh()

    def _stopped(self):
        """No process runs. A sampler that has them keeps its state until it has heard."""
        with self._changing:
            if self.state is not State.SAMPLING:
                self._become(State.STOPPED)

    # --- one forward pass

    def update(self, patcher, options):
        """Bring options and LoRA weights of every rank to those of this MODEL; acknowledged before anything is
        computed. Raises patch_transfer.Refused.
        """
        specs, there = patch_transfer.encode_patches(patcher, options), self._transferred
        if patcher is not None and patcher.patches_uuid != there.patches:
            there.patches = None
            self._send_weights(patcher)
            there.patches = patcher.patches_uuid
        if specs != there.options:
            there.options = None  # one rank may refuse what another has taken over
            self._answers("options", self.pool.ask("options", specs=specs))
            there.options = specs

    def _send_weights(self, patcher):
        """LoRA tensors that a rank has from before stay there: a new strength sends numbers alone."""
        there = self._transferred
        data, tensors = replica.weights_of(patcher)
        if not data and there.tensors == set():
            return
        numbers = [there.number_of(tensor) for tensor in tensors]
        new = {number: tensor for number, tensor in zip(numbers, tensors) if number not in (there.tensors or ())}
        there.tensors = None  # until every rank says that it has these
        asked = self.pool.ask("weights", list(new.values()), new=list(new), numbers=numbers, patches=data)
        for rank, answer in self._answers("weights", asked).items():
            if answer["patched"] != len(patcher.patches):
                raise RanksFailed(
                    f"Rank {rank} patched {answer['patched']} weights, rank 0 has {len(patcher.patches)} to patch."
                )
        there.tensors = set(numbers)
        there.numbers = {key: kept for key, kept in there.numbers.items() if kept[0] in there.tensors}

    @contextmanager
    def forward(self, network, inputs, moment=(None, 0)):
        """One pass on every rank; inside the block rank 0 calls the network with `inputs` ({name: value}). moment:
        (step, steps), see flux2/attention_slot.step_of.
        """
        data, kinds, tensors = describe_inputs(inputs)
        self.pool.check()
        number = self.pool.ask("forward", inputs=data, kinds=kinds, moment=list(moment))
        self._pass, step = number, self.step
        try:
            step.send(tensors)
            with step.installed(network, failed=lambda error: self._interrupt(number)):
                yield
        except BaseException as error:
            self._after(number, error, step.mesh)
            raise
        finally:
            self._pass = self._asked_since = None
        self.pool.check()

    def _interrupt(self, number):
        """Rank 0 gave this pass up: let the others do the same, so that what is left of it is exchanged in no time."""
        if self.mesh is None or self.mesh.broken is not None:
            return  # nothing will be exchanged, and what is sent to a host that is gone delays the system's finding out
        self._asked_since = self._asked_since or time.perf_counter()
        self.pool.tell({"do": "interrupt", "number": number})

    def _after(self, number, error, mesh):
        """Rank 0's pass raised. With the mesh whole, wait for the others to come to its end; else end them, and say who
        is the reason.
        """
        if mesh.broken is None and self.pool.started:
            self._interrupt(number)
            if not self._reached_end(number):
                self.stop()
            return
        # a connection to another host may end a little later than that of the collectives
        deadline = time.perf_counter() + 6
        while self.pool.failure is None and self.pool.started and time.perf_counter() < deadline:
            time.sleep(0.02)
        failure = self.pool.failure
        self.stop()
        if isinstance(error, Exception):
            raise RanksFailed(failure or f"The exchange between the ranks failed: {error}") from error

    def _reached_end(self, number):
        """Whether every rank came to the end of a pass that rank 0 gave up. Why one of them failed in it is not told:
        rank 0 has its own reason.
        """
        deadline = time.perf_counter() + STOPPING
        while self.pool.started and time.perf_counter() < deadline:
            try:
                self.pool.done("forward", number, deadline - time.perf_counter())
                return True
            except RanksFailed:
                continue
        return False

    # --- a sampling, and after it

    def finish(self, patience=FINISHING_S):
        """The end of a sampling: every rank's times into `last`. Raises what went wrong on any rank, also in the last
        pass.
        """
        answers = self._answers("finish", self.pool.ask("finish"), patience)
        self.last = {
            rank: {"times": answer["times"], "attention": answer["attention"]} for rank, answer in answers.items()
        }
        if self.mesh is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.last[0] = {"times": self.mesh.stats.read().as_data(), "attention": {}}
            self.mesh.stats.reset()
        self.pool.check()

    def at_rest(self):
        """A sampling has ended, however it ended. Processes whose model never came to rank 0 are not kept for it."""
        with self.turn:
            if not self.running:
                self._become(State.STOPPED, State.SAMPLING)
                return
            there = State.READY if self.connection else State.LOADING if self._load else State.STARTING
            self._become(there, State.SAMPLING)
            loaded = self.in_use()
            self._seen_loaded = self._seen_loaded or loaded  # it may be unloaded before the supervisor looks
            if not loaded:
                self._idle_since, self._patience = time.perf_counter(), GRACE

    def drop(self, wait=False):
        """Give the other ranks' memory back; their processes end GRACE seconds later unless they are needed again."""
        with self.turn:
            if not self.running or not self._become(State.DRAINING, State.LOADING, State.READY):
                return
            self.end_mesh()
            number = self.pool.ask("drop")
            log.info("Sequence parallel: the model was unloaded, and %d other ranks drop theirs.", self.plan.size - 1)
            self._source = self._load = None
            self._transferred = Transferred()
            self._seen_loaded, self._idle_since, self._patience = False, time.perf_counter(), GRACE
        if wait:
            self.pool.done("drop", number, ACKNOWLEDGING_S)

    def stop(self):
        """End every process of this session, and wait until they are gone."""
        self.end_mesh()
        if self.pool is not None:
            self.pool.stop()
            self._stopped()

    # --- by the pool's supervisor, now and then

    def _look_after(self):
        """A cancel that nobody could answer, a model that rank 0 has unloaded, processes that nobody needs any more."""
        if self.state is State.SAMPLING:
            self._watch_cancel()
        elif self.turn.acquire(blocking=False):
            # never wait here: whoever has the turn may be waiting for this thread to end
            try:
                self._let_go()
            finally:
                self.turn.release()

    def _let_go(self):
        if self.state is State.SAMPLING:
            return
        if self._idle_since is not None:
            if time.perf_counter() - self._idle_since > self._patience:
                self.pool.stopping.set()
            return
        loaded = self.in_use()
        if self._seen_loaded and not loaded:
            self.drop()
        self._seen_loaded = self._seen_loaded or loaded

    def _watch_cancel(self):
        """Rank 0 may be waiting inside a collective when the user cancels, or for ranks that do not come to the end of
        a pass: then they are ended.
        """
        if self._pass is None:
            return
        if self.cancelled():
            self._asked_since = self._asked_since or time.perf_counter()
        if self._asked_since and time.perf_counter() - self._asked_since > STOPPING:
            self.pool.fail(
                "The other ranks did not come to the end of a cancelled step in time and were stopped. The next prompt "
                "starts them again."
            )
            self.pool.stopping.set()


class BackgroundResult:
    """A function's result, computed in a thread of its own so that the caller can look at other things while it waits.
    unwanted(result): called for a result that comes after the `with` block was left by an exception.
    """

    def __init__(self, function, unwanted):
        self.value = self.error = None
        self.finished, self.unwanted, self.left = threading.Event(), unwanted, False
        threading.Thread(target=self._run, args=(function,), name="flux2 ranks: mesh", daemon=True).start()

    def _run(self, function):
        try:
            self.value = function()
        except BaseException as error:
            self.error = error
        self.finished.set()
        if self.left and self.value is not None:
            self.unwanted(self.value)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.left = error is not None
        if self.left and self.finished.is_set() and self.value is not None:
            self.unwanted(self.value)

    def result(self, check):
        while not self.finished.wait(0.05):
            check()
        if self.error is not None:
            raise RanksFailed(f"Rank 0 could not connect to the other ranks: {self.error}") from self.error
        return self.value


# --- which session belongs to which model ---------------------------------------------------------------------------

_sessions = weakref.WeakSet()
_of_model = weakref.WeakKeyDictionary()


def session_of(base, plan, device, **watching):
    """The ParallelSession of a loaded model (BaseModel) for a plan. Another plan with the same processes keeps them;
    otherwise those of before are ended.
    """
    session = _of_model.get(base)
    if session is not None and session.plan.processes() == plan.processes():
        session.plan = plan
        if session.pool is not None:
            session.pool.plan = plan
        return session
    if session is not None:
        session.stop()
    session = _of_model[base] = ParallelSession(plan, device, **watching)
    weakref.finalize(base, session.stop)
    return session


def running_plans():
    """The ParallelPlans whose processes run for some model."""
    return [session.plan for session in list(_sessions) if session.running]


def existing(base):
    """The ParallelSession of a loaded model, or None."""
    return _of_model.get(base)


def stop_all():
    """At the end of the process: every worker, and every process group."""
    for one in (*list(_sessions), *ahead.waiting):
        one.stop()
    process_groups.wait_until_ended(10)


atexit.register(stop_all)
