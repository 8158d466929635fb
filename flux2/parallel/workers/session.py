"""The ranks of one loaded model: its replicas, the mesh between them, and the forward passes that they share. Rank 0's
side.

  group = group_of(base_model, plan)           # the one that is there, or a new one in place of one with other
                                               processes
  group.begin(patcher); group.ready()          # starts what is not running
  group.update(patcher, options)               # LoRA and options of the other ranks, where they differ
  with group.forward(network, inputs, moment):
      ...                                      # rank 0's own pass
  group.finish(); group.at_rest()              # the end of a sampling: every rank's times are in group.last
  group.stop()

What a failure costs: a cancel, and a rank that ran out of memory inside a pass, leave processes, replicas and mesh as
they are (flux2/parallel). A rank that is gone ends all of them; the next sampling starts anew, its weights coming from
the system's file cache.
"""

import atexit
from contextlib import contextmanager
import logging
import secrets
import threading
import time
import weakref

import torch

from ....attention.parallel import make_mesh
from ..attention import ring_fallback
from . import patch_transfer, versions, process_groups, launch, replica
from .pool import Crew, RanksFailed
from .step import Share, described

LOADING, MESHING, ACKNOWLEDGING, FINISHING = 3600, 150, 300, 600  # seconds that ranks may take
STOPPING = 1.2  # seconds that the ranks may take to come to the end of a cancelled pass; then they are ended
ROOM = 1.25  # memory of a GPU that has to be free for a model, over its size: what a pass needs besides is part of that
GRACE = 30  # seconds between the model leaving the GPUs and the end of the processes
living = weakref.WeakSet()
log = logging.getLogger(__name__)


def nobody_asks(text, done, of):
    """Progress that is shown nowhere."""


class Group:
    """See the module's text. base: ComfyUI's model
    (BaseModel),
    held weakly. seconds: from the start of the processes until they ran ("configure"), had loaded ("load"), stood ready
    ("ready"). last: what the last sampling reported, by rank. cancelled(): whether the user asked to stop. in_use():
    whether rank 0 still has the model loaded.
    """

    def __init__(self, plan, device, cancelled=lambda: False, in_use=lambda: True):
        self.plan, self.device = plan, torch.device(device)
        self.cancelled, self.in_use = cancelled, in_use
        self.name = "this process", versions.device_name(self.device)
        self.crew, self.seconds, self.last, self.turn = None, {}, {}, threading.RLock()
        self._forget()
        if not living:
            atexit.register(stop_all)
        living.add(self)

    def _forget(self):
        """Nothing is known to be on the other ranks."""
        self.mesh = self.share = self._groups = self._store = None
        self._source = self._loading = self._arranged = None
        self._nothing_taken_over()
        self._pass, self._idle_since, self._seen_loaded, self._asked_since = None, None, False, None
        self._generation = 0

    def _nothing_taken_over(self):
        """The replicas are as they were loaded. _options, _weights: what every rank has, None while that is not known;
        see
        `update`.
        """
        self._options, self._weights, self._sent, self._patcher_state = None, set(), {}, None

    @property
    def begun(self):
        """Whether processes run that have a model, or are loading it."""
        return self.crew is not None and self.crew.started and self._source is not None

    @property
    def sampling(self):
        """Whether a sampler has begun and not ended."""
        return self.crew is not None and self.crew.busy

    # --- from nothing to ready

    def start(self):
        """Start the processes, unless they run. Returns at once. OSError or ValueError when rank 0 cannot listen."""
        with self.turn:
            if self.crew is None or not self.crew.started:
                self.stop()  # what is left of those before
                self._forget()
                self.seconds = {}
                self.crew = Crew(self.plan, on_failure=self.end_mesh, look_after=self._look_after)
                self.crew.start()
                self._idle_since = time.perf_counter()

    def begin(self, patcher, progress=nobody_asks):
        """A sampling begins: every process is there and loads the model, or has it. Returns while they load, so that
        rank
        0 can load at the same time.

        progress(text, how many are done, of how many) is called while this waits, here and in `ready`, and may raise (a
        cancel). Raises replica.NotReplicable, OSError, ValueError, RanksFailed.
        """
        source = replica.source_of(patcher)
        with self.turn:
            self.start()
            self.crew.busy, self._idle_since = True, None
        self._await("configure", 1, 660, "starting processes", progress)
        if source != self._source:
            self._make_room(patcher.model_size())
            self._source, self._loading = source, self.crew.ask("load", source=source)
            self._nothing_taken_over()

    def _make_room(self, size):
        """Other models leave the other ranks' GPUs when this one, of `size` bytes, would not fit beside them. ComfyUI
        does
        the same for rank 0 a little later.
        """
        answers = self._answers("room", self.crew.ask("room"))
        free = [answer["free"] for answer in answers.values() if answer["free"] is not None]
        if free and min(free) < ROOM * size:
            for other in list(living):
                if other is not self:
                    other.drop(wait=True)

    def ready(self, progress=nobody_asks):
        """Until every rank has the model and the mesh stands."""
        self._await("load", self._loading, LOADING, "loading the model", progress)
        if self.share is None or self._arranged != self.plan.mesh():
            self._make_mesh(progress)
            self.seconds.setdefault("ready", time.perf_counter() - self.crew.began)
            progress("ready", self.plan.size - 1, self.plan.size - 1)

    def _await(self, what, number, patience, text, progress):
        others = self.plan.size - 1
        answers = self.crew.done(what, number, patience, lambda waiting: progress(text, others - waiting, others))
        self.seconds.setdefault(what, time.perf_counter() - self.crew.began)
        return answers

    def _answers(self, what, number, patience=ACKNOWLEDGING):
        """What every rank answers; a cancel of the user is heard meanwhile."""

        def wait(waiting):
            if self.cancelled():
                raise RanksFailed("The prompt was cancelled.")

        return self.crew.done(what, number, patience, wait)

    def _make_mesh(self, progress):
        """Process groups between all ranks, made by all of them at the same time. In a thread: a rank that dies
        meanwhile
        would hold this one up.
        """
        self.end_mesh()
        self._generation += 1
        far = next((member for member in self.crew.members if member.process is None), None)
        host = far.channel.socket.getsockname()[0] if far else launch.LOOPBACK
        self._store = self._store or process_groups.hosted_store(host)
        # not to be guessed, and not the secret: keys of the store travel as they are
        prefix = f"{secrets.token_hex(16)}/{self._generation}"
        number = self.crew.ask(
            "mesh",
            mesh=self.plan.mesh(),
            size=self.plan.size,
            prefix=prefix,
            store=[host, self._store.port],
            each=lambda member: {"host": member.address if member.process is None else host},
        )
        made = InThread(lambda: self._own_mesh(prefix, host), unwanted=lambda made: made[0].end())
        with made:
            self._await("mesh", number, MESHING, "connecting", progress)
            mine, self.mesh = made.result(self.crew.check)
        self._groups, self.share, self._arranged = mine, Share(self.mesh, ring_fallback()), self.plan.mesh()

    def _own_mesh(self, prefix, host):
        mine = process_groups.Groups(self._store, prefix, 0, self.device, host)
        return mine, make_mesh(**self.plan.mesh(), device=self.device, rank=0, size=self.plan.size, groups=mine.make)

    def end_mesh(self):
        """End what waits in the mesh, from any thread. The next pass needs a new one."""
        mine, self._groups, mesh, self.share = self._groups, None, self.mesh, None
        if mesh is not None:
            mesh.abort = lambda: True
        if mine is not None:
            mine.end()

    # --- one forward pass

    def update(self, patcher, options):
        """Bring options and LoRA weights of every rank to those of this MODEL; acknowledged before anything is
        computed.
        Raises carry.Refused.
        """
        specs = patch_transfer.carried(patcher, options)
        if patcher is not None and patcher.patches_uuid != self._patcher_state:
            self._patcher_state = None
            self._send_weights(patcher)
            self._patcher_state = patcher.patches_uuid
        if specs != self._options:
            self._options = None  # one rank may refuse what another has taken over
            self._answers("options", self.crew.ask("options", specs=specs))
            self._options = specs

    def _send_weights(self, patcher):
        """LoRA tensors that a rank has from before stay there: a new strength sends numbers alone."""
        data, tensors = replica.weights_of(patcher)
        if not data and self._weights == set():
            return
        numbers = [self._number_of(tensor) for tensor in tensors]
        new = {number: tensor for number, tensor in zip(numbers, tensors) if number not in (self._weights or ())}
        self._weights = None  # until every rank says that it has these
        asked = self.crew.ask("weights", list(new.values()), new=list(new), numbers=numbers, patches=data)
        for rank, answer in self._answers("weights", asked).items():
            if answer["patched"] != len(patcher.patches):
                raise RanksFailed(
                    f"Rank {rank} patched {answer['patched']} weights, rank 0 has {len(patcher.patches)} to patch."
                )
        self._weights = set(numbers)
        self._sent = {key: kept for key, kept in self._sent.items() if kept[0] in self._weights}

    def _number_of(self, tensor):
        """The number that the ranks know a tensor by; it is kept alive, so that its id stays its own."""
        if id(tensor) not in self._sent:
            self._sent[id(tensor)] = (1 + max((number for number, _ in self._sent.values()), default=0), tensor)
        return self._sent[id(tensor)][0]

    @contextmanager
    def forward(self, network, inputs, moment=(None, 0)):
        """One pass on every rank; inside the block rank 0 calls the network with `inputs` ({name: value}). moment:
        (step,
        steps), see flux2/patch.step_of.
        """
        data, kinds, tensors = described(inputs)
        self.crew.check()
        number = self.crew.ask("forward", inputs=data, kinds=kinds, moment=list(moment))
        self._pass = number
        try:
            self.share.send(tensors)
            with self.share.installed(network, failed=lambda error: self._interrupt(number)):
                yield
        except BaseException as error:
            self._after(number, error)
            raise
        finally:
            self._pass = self._asked_since = None
        self.crew.check()

    def _interrupt(self, number):
        """Rank 0 gave this pass up: let the others do the same, so that what is left of it is exchanged in no time."""
        if self.mesh.broken is not None:
            return  # nothing will be exchanged, and what is sent to a host that is gone delays the system's finding out
        self._asked_since = self._asked_since or time.perf_counter()
        self.crew.tell({"do": "interrupt", "number": number})

    def _after(self, number, error):
        """Rank 0's pass raised. With the mesh whole, wait for the others to come to its end; else end them, and say
        who is
        the reason.
        """
        if self.mesh.broken is None and self.crew.started:
            self._interrupt(number)
            if not self._ended(number):
                self.stop()
            return
        # a connection to another host may end a little later than that of the exchanges
        deadline = time.perf_counter() + 6
        while self.crew.failure is None and self.crew.started and time.perf_counter() < deadline:
            time.sleep(0.02)
        failure = self.crew.failure
        self.stop()
        if isinstance(error, Exception):
            raise RanksFailed(failure or f"The exchange between the ranks failed: {error}") from error

    def _ended(self, number):
        """Whether every rank came to the end of a pass that rank 0 gave up. Why one of them failed in it is not told:
        rank
        0 has its own reason.
        """
        deadline = time.perf_counter() + STOPPING
        while self.crew.started and time.perf_counter() < deadline:
            try:
                self.crew.done("forward", number, deadline - time.perf_counter())
                return True
            except RanksFailed:
                continue
        return False

    # --- a sampling, and after it

    def finish(self, patience=FINISHING):
        """The end of a sampling: every rank's times into `last`. Raises what went wrong on any rank, also in the last
        pass.
        """
        answers = self._answers("finish", self.crew.ask("finish"), patience)
        self.last = {
            rank: {"times": answer["times"], "attention": answer["attention"]} for rank, answer in answers.items()
        }
        if self.mesh is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.last[0] = {"times": self.mesh.stats.read().as_data(), "attention": {}}
            self.mesh.stats.reset()
        self.crew.check()

    def at_rest(self):
        """A sampling has ended, however it ended."""
        with self.turn:
            if self.crew is not None:
                self.crew.busy = False
                self._seen_loaded = self._seen_loaded or self.in_use()  # it may be unloaded before the keeper looks

    def unused(self):
        """A sampling ended before its time. Processes whose model never came to rank 0 are not kept for it."""
        if not self.in_use():
            self._idle_since = time.perf_counter()

    def drop(self, wait=False):
        """Give the other ranks' memory back; their processes end GRACE seconds later unless they are needed again."""
        with self.turn:
            if self.crew is None or not self.crew.started or self.crew.busy or self._source is None:
                return
            self.end_mesh()
            number = self.crew.ask("drop")
            log.info("Sequence parallel: the model was unloaded, and %d other ranks drop theirs.", self.plan.size - 1)
            self._source = None
            self._nothing_taken_over()
            self._seen_loaded, self._idle_since = False, time.perf_counter()
        if wait:
            self.crew.done("drop", number, ACKNOWLEDGING)

    def stop(self):
        """End every process of this group."""
        self.end_mesh()
        if self.crew is not None:
            self.crew.stop()

    def _look_after(self):
        """By the crew's keeper: a cancel that nobody could answer, a model that rank 0 has unloaded, processes that
        nobody
        needs any more.
        """
        if self.crew.busy:
            self._watch_cancel()
        elif self.turn.acquire(
            blocking=False
        ):  # never wait here: whoever has the turn may be waiting for this thread to end
            try:
                self._let_go()
            finally:
                self.turn.release()

    def _let_go(self):
        if self.crew.busy:
            return
        loaded = self.in_use()
        if self._seen_loaded and not loaded:
            self.drop()
        self._seen_loaded = self._seen_loaded or loaded
        if self._idle_since is not None and time.perf_counter() - self._idle_since > GRACE:
            self.crew.stopping.set()

    def _watch_cancel(self):
        """Rank 0 may be waiting inside an exchange when the user cancels, or for ranks that do not come to the end of a
        pass: then they are ended.
        """
        if self._pass is None:
            return
        if self.cancelled():
            self._asked_since = self._asked_since or time.perf_counter()
        if self._asked_since and time.perf_counter() - self._asked_since > STOPPING:
            self.crew.fail(
                (
                    "The other ranks did not come to the end of a cancelled step in time and were stopped. The next "
                    "prompt starts them again."
                )
            )
            self.crew.stopping.set()


class InThread:
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


# --- which group belongs to which model
# ----------------------------------------------------------------------------------

_groups = weakref.WeakKeyDictionary()


def group_of(base, plan, device, **watching):
    """The Group of a loaded model (BaseModel) for a plan. Another plan with the same processes keeps them; otherwise
    those
    of before are ended.
    """
    group = _groups.get(base)
    if group is not None and group.plan.processes() == plan.processes():
        group.plan = plan
        if group.crew is not None:
            group.crew.plan = plan
        return group
    if group is not None:
        group.stop()
    group = _groups[base] = Group(plan, device, **watching)
    weakref.finalize(base, group.stop)
    return group


def existing(base):
    """The Group of a loaded model, or None."""
    return _groups.get(base)


def stop_all():
    for group in list(living):
        group.stop()
