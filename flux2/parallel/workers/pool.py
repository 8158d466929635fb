"""The worker processes of a session, as rank 0 sees them: started, proven, asked to do something, watched, ended.

  pool = WorkerPool(plan)
  pool.start()                                 # returns at once
  number = pool.ask("load", source=...)        # tell every worker
  answers = pool.done("load", number, 600)     # wait for all of them: {rank: what it answered}; raises what went wrong
                                               on any
  pool.stop()                                  # ends every process and waits until it is gone

Threads: one supervisor starts the processes (Linux ends a worker with the thread that started it) and lives as long as
they do; one reader per worker receives. What they find wrong becomes `failure`, whose first text is kept, and is raised
in the main thread by the next `done` or `check`.
"""

from collections import Counter
from dataclasses import dataclass, field
import logging
import secrets
import threading
import time

from ....attention.errors import Explained
from ....attention.parallel import Degrees
from . import answers, channel, kernel_choice, launch, versions
from .answers import ALIVE, WORK
from .rendezvous import Rendezvous

log = logging.getLogger(__name__)
STARTING, REMOTE_STARTING = 180, 600  # seconds until every process has reported
HANDSHAKE = 10  # seconds that a connection has to prove that it knows the secret
POLL, LOOK = 0.05, 0.5  # seconds between looks at the processes while a prompt runs, and otherwise
UNPROVEN, UNPROVEN_EACH = 64, 16  # connections that have not proven the secret, of all addresses and of each
LONGEST_ANSWER = 2**20  # bytes that a worker's message may have
SILENCE = 45  # seconds without a word from a worker, who says every few seconds that it is alive, until it is lost
SUSPICION = 2.0  # seconds after one rank's exchange failed in which the rank that is the reason should be known
RECOVERABLE = ("forward", "options", "weights")  # work that may fail on a rank and leave it usable
LESS_MEMORY = "Use fewer pixels or references, an fp8 checkpoint, or GPUs with more memory."


class RanksFailed(Explained, RuntimeError):
    """Another rank is gone or could not do its part. The text names the rank."""

    topic = "several-gpus"


@dataclass(frozen=True)
class ParallelPlan:
    """Who takes part: ulysses * ring * tensor ranks. device: "cuda" or "cpu". gpus: index in this process of each rank
    on this machine, rank 0's first; None for the CPU. elsewhere: ranks that join from other hosts. overlap_chunks: see
    attention/parallel/mesh.py; 1 exchanges all heads of an attention call at once. tensor: parts that the weights are
    split into; 1: every rank has all of them.
    """

    ulysses: int
    ring: int
    device: str
    gpus: tuple
    elsewhere: int = 0
    overlap_chunks: int = 1
    tensor: int = 1

    @property
    def degrees(self):
        return Degrees(self.ulysses, self.ring, tensor=self.tensor)

    @property
    def size(self):
        return self.degrees.size

    def mesh(self):
        """The arguments of make_mesh that are a matter of choice."""
        chosen = {"ulysses": self.ulysses, "ring": self.ring, "tensor": self.tensor}
        return {**chosen, "overlap_chunks": self.overlap_chunks}

    def processes(self):
        """What has to be equal for two plans to use the same processes."""
        return self.size, self.device, self.gpus, self.elsewhere


@dataclass
class WorkerHandle:
    """A worker. done: {what: (number of the last one, what it answered)}; lines: the end of its output; heard: when its
    last message came (time.perf_counter).
    """

    rank: int
    where: str
    process: object = None
    channel: object = None
    local_rank: int = 0
    address: str = launch.LOOPBACK
    device: str = ""
    pid: int = 0
    done: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)
    heard: float = field(default_factory=time.perf_counter)

    def __str__(self):
        return f"Rank {self.rank} ({self.where}{', ' + self.device if self.device else ''})"

    def ending(self):
        """How its process ended, with its last words unless it was killed; "" while it runs or when it is on another
        host.
        """
        how = launch.ending_of(self.process) if self.process is not None else ""
        words = [line.strip() for line in self.lines if line.strip()][-1:]
        return f"{how}. Its last words: {words[0][:300]}" if words and "status" in how else how


class WorkerPool:
    """See the module's text. busy(): whether a prompt waits for the workers. on_failure(): called once, from any
    thread, when nobody can be waited for any more. look_after(): called by the supervisor now and then.
    """

    def __init__(self, plan, on_failure=lambda: None, look_after=lambda: None, busy=lambda: False):
        self.plan, self.on_failure, self.look_after, self.busy = plan, on_failure, look_after, busy
        self.workers, self.failure, self.fatal = [], None, False
        self.changed, self.stopping = threading.Condition(), threading.Event()
        self.open = False
        self._number, self._suspect, self._supervisor, self._looked = 1, None, None, time.perf_counter()
        self.store = Rendezvous()

    @property
    def started(self):
        """Whether the processes run, as far as is known."""
        return self._supervisor is not None and not self.stopping.is_set() and not (self.failure and self.fatal)

    # --- starting and ending

    def start(self):
        """Start the processes. OSError or ValueError with a sentence when rank 0 cannot listen, or when its code is not
        that of the files any more.
        """
        versions.running_digest()
        host, port, self.open = launch.listening_at()
        self.secret = launch.os.environ[launch.SECRET] if self.open else secrets.token_hex(32)
        self._listening = launch.listen(host, port)
        self.began = time.perf_counter()
        self._supervisor = threading.Thread(target=self._supervise, name="flux2 ranks: supervisor", daemon=True)
        self._supervisor.start()

    def stop(self, patience=8):
        """End every process and wait until they are gone. Nothing can be asked afterwards."""
        self.stopping.set()
        if self._supervisor is not None and self._supervisor is not threading.current_thread():
            self._supervisor.join(patience)

    def _supervise(self):
        """The supervisor thread. What it starts ends with it."""
        try:
            self._start_processes()
            self._accept_all()
            while not self.stopping.wait(POLL if self.busy() else LOOK):
                self._look()
                self.look_after()
        except Exception as error:
            said = isinstance(error, RanksFailed)
            self.fail(str(error) if said else f"The other ranks could not be started: {type(error).__name__}: {error}")
        finally:
            self._end([worker.process for worker in self.workers if worker.process is not None])

    def _start_processes(self):
        address = self._listening.getsockname()[:2]
        for rank in range(1, self.plan.size - self.plan.elsewhere):
            gpu = self.plan.gpus[rank]
            process = launch.start(rank, self.plan.size, gpu, address, self.secret, self.plan.size)
            worker = WorkerHandle(
                rank, "this machine's CPU" if gpu is None else f"cuda:{gpu}", process, pid=process.pid
            )
            self.workers = [*self.workers, worker]
            in_thread(self._hear, worker, name=f"output of rank {rank}")

    def _hear(self, worker):
        """A worker's output: kept for the text of a failure, and in ComfyUI's log at its debug level."""
        for line in worker.process.stdout:
            worker.lines = [*worker.lines[-30:], line.rstrip()]
            log.debug("rank %d: %s", worker.rank, line.rstrip())

    def _look(self):
        """Raise for a process that ended, and for an exchange that failed without anybody to blame."""
        for worker in self.workers:
            if worker.ending() and not self.stopping.is_set():
                self.fail(lost_text(worker, worker.ending()), worker=worker)
                raise RanksFailed(self.failure)
        now = time.perf_counter()
        if now - self._looked > SILENCE / 4:  # this process itself stood still: nothing is known of the others
            for worker in self.workers:
                worker.heard = now
        self._looked = now
        for worker in self.workers:
            if worker.channel is not None and now - worker.heard > SILENCE:
                self.fail(lost_text(worker, f"it has not answered for {SILENCE:g} seconds"), worker=worker)
                raise RanksFailed(self.failure)
        if self._suspect and time.perf_counter() - self._suspect[0] > SUSPICION:
            raise RanksFailed(self._suspect[1])

    def _end(self, processes):
        self.stopping.set()
        self._listening.close()
        self.on_failure()
        for worker in self.workers:
            if worker.channel is not None:
                quietly(worker.channel.send, {"do": "stop"})
        launch.end(
            processes, 0.3 if self.failure or self.busy() else 2.0
        )  # busy: a cancelled prompt is waiting for this
        for worker in self.workers:
            if worker.channel is not None:
                worker.channel.close()
        with self.changed:
            self.changed.notify_all()

    # --- who joins

    def _accept_all(self):
        """Accept connections until everybody is here. Each proves itself in a thread of its own, so that a stranger who
        says nothing delays nobody; how many may do so at a time is bounded.
        """
        self._listening.settimeout(0.2)
        arrivals, unproven = [], Counter()
        while not self.stopping.is_set() and self._awaited(arrivals):
            self._look()
            if time.perf_counter() - self.began > (REMOTE_STARTING if self.plan.elsewhere else STARTING):
                raise RanksFailed(self._awaited(arrivals))
            try:
                sock, (address, *_) = self._listening.accept()
            except TimeoutError:
                continue
            with self.changed:
                full = unproven.total() >= UNPROVEN or unproven[address] >= UNPROVEN_EACH + self.plan.size
                unproven[address] += not full
            if full:
                sock.close()
            else:
                in_thread(self._handshake, sock, address, arrivals, unproven, name="handshake")
        self._listening.close()
        for offset, worker in enumerate(sorted(arrivals, key=lambda one: (one.where, one.local_rank))):
            worker.rank = self.plan.size - self.plan.elsewhere + offset
            self.workers = [*self.workers, worker]
            self._register(worker)

    def _awaited(self, arrivals):
        """Who is not here yet, as a sentence; "" when everybody is."""
        late = [str(worker) for worker in self.workers if worker.channel is None]
        if late:
            return f"{', '.join(late)} did not report within {STARTING} seconds."
        if len(arrivals) < self.plan.elsewhere:
            return (
                f"{len(arrivals)} of {self.plan.elsewhere} ranks on other hosts joined within {REMOTE_STARTING} "
                "seconds. Start the workers there with torchrun (see docs/several-gpus.md), with this host's "
                f"{launch.LISTEN} as --join and the same {launch.SECRET}."
            )
        return ""

    def _handshake(self, sock, address, arrivals, unproven):
        """One connection: it proves that it knows the secret and says who it is, or is refused."""
        try:
            connection = channel.accept(sock, self.secret, HANDSHAKE, LONGEST_ANSWER)
            here, _ = connection.receive(HANDSHAKE)
            answers.check_introduction(here)
        except (OSError, ValueError) as error:
            sock.close()
            log.warning("Sequence parallel refused a connection from %s: %s", address, error)
            return
        finally:
            with self.changed:
                unproven[address] -= 1
        with self.changed:
            mine = [
                one for one in self.workers if (one.rank, one.pid) == (here["rank"], here["pid"]) and not one.channel
            ]
            room = here["rank"] is None and len(arrivals) < self.plan.elsewhere
            if mine:
                mine[0].channel = connection
            elif room:
                where, local_rank = f"{here['host']} GPU {here['local_rank']}", here["local_rank"]
                arrivals.append(WorkerHandle(0, where, None, connection, local_rank, address, pid=here["pid"]))
        if mine:
            self._register(mine[0])
        elif not room:
            log.warning("Sequence parallel needs no rank from %s: all are there.", address)
            connection.close()

    def _register(self, worker):
        in_thread(self._read, worker, name=f"rank {worker.rank}")
        self._tell(
            worker,
            {
                "do": "configure",
                "number": 1,
                "rank": worker.rank,
                "device": self.plan.device,
                **versions.configuration(),
            },
        )

    # --- messages

    def ask(self, what, tensors=(), each=lambda worker: {}, **content):
        """Tell every worker to do something; returns its number, for `done`. each(worker): content for one of them."""
        with self.changed:
            self._number += 1
            number = self._number
        messages = [(worker, {"do": what, "number": number, **content, **each(worker)}) for worker in self.workers]
        if not tensors:
            for worker, message in messages:
                self._tell(worker, message)
            return number
        for thread in [
            in_thread(self._tell, worker, message, tensors, name=f"telling rank {worker.rank}")
            for worker, message in messages
        ]:
            thread.join()  # gigabytes of a LoRA go to all ranks at the same time
        return number

    def tell(self, message):
        """Say something to every worker that is not answered."""
        for worker in self.workers:
            self._tell(worker, message)

    def _tell(self, worker, message, tensors=()):
        try:
            worker.channel.send(message, tensors)
        except OSError as error:
            self._lost(worker, error)

    def done(self, what, number, patience, wait=lambda waiting: None):
        """Wait until every worker has done `number`; returns their answers by rank. wait(how many are awaited) is
        called meanwhile and may raise (a cancel).
        """
        deadline = time.perf_counter() + patience
        while True:
            with self.changed:
                waiting = self._waiting(what, number)
                if waiting and self.failure is None:
                    self.changed.wait(POLL)
                    waiting = self._waiting(what, number)
            self.check()
            if not waiting:
                return {worker.rank: worker.done[what][1] for worker in self.workers}
            if time.perf_counter() > deadline:
                raise RanksFailed(f"{', '.join(waiting)} did not {WORK[what]} within {patience:g} seconds.")
            wait(len(waiting))

    def _waiting(self, what, number):
        absent = [f"{self.plan.size - 1 - len(self.workers)} ranks that have not joined"] * (
            len(self.workers) < self.plan.size - 1
        )
        return [str(worker) for worker in self.workers if worker.done.get(what, (0,))[0] < number] + absent

    def check(self):
        """Raise what went wrong on another rank. After something fatal every process is ended."""
        with self.changed:
            if self.failure is None and self.started:
                return
            text = self.failure or "The other ranks were stopped. The next prompt starts them again."
            self.failure, ends = self.failure if self.fatal else None, self.fatal or not self.started
        if ends:
            self.stop()
        raise RanksFailed(text)

    # --- readers

    def _read(self, worker):
        """A worker's messages, until its connection ends. What is no answer ends the pool with a sentence."""
        try:
            while True:
                message, tensors = worker.channel.receive()
                worker.heard = time.perf_counter()
                if message == ALIVE:
                    continue
                try:
                    answers.check(message, tensors, self._number)
                except ValueError as error:
                    worker.channel.close()
                    self.fail(f"{worker} sent what is no answer: {error} The prompt was stopped.", worker=worker)
                    return
                if "request" in message:
                    in_thread(self._answer, worker, message, name=f"request of rank {worker.rank}")
                else:
                    self._note(worker, message)
        except OSError as error:
            self._lost(worker, error)

    def _answer(self, worker, request):
        """A worker asks while it and rank 0 compute."""
        try:
            if request["request"] == "kernel":
                result = kernel_choice.answer_of_rank_0(request, self.plan.size, lambda: not self.started)
            else:
                result = self.store.answer(request)
            worker.channel.send({"do": "answer", "id": request["id"], "result": result})
        except (OSError, ValueError) as error:  # one that is gone is noticed elsewhere; the other waits, and says so
            log.debug("Sequence parallel: a request of %s was not answered: %s", worker, error)

    def _note(self, worker, message):
        what = message.get("done") or message.get("failed")
        if "failed" in message:  # first: whoever waits for it to be done must find the failure
            self._record_failure(worker, what, message)
        elif what == "configure":
            worker.device = message["name"]
            wrong = versions.different(versions.versions(), message["versions"])
            if wrong:
                self.fail(
                    f"{worker} cannot work with rank 0: {'; '.join(wrong)}. Install the same versions on every host, "
                    "and restart ComfyUI after an update."
                )
        with self.changed:
            worker.done[what] = (message["number"], message)
            self.changed.notify_all()

    def _record_failure(self, worker, what, message):
        text = f"{worker} could not {WORK[what]}: {message['text'].rstrip('.')}."
        if message["cause"] == "exchange":  # somebody else is the reason, and will be known soon
            self._suspect = self._suspect or (time.perf_counter(), text)
        elif message["cause"] != "interrupted" or message["broken"]:
            text += f" {LESS_MEMORY}" if message["cause"] == "memory" else ""
            self.fail(text, fatal=message["broken"] or what not in RECOVERABLE, worker=worker)

    def _lost(self, worker, error):
        """The connection to a worker ended: find out why, unless it was us."""
        deadline = time.perf_counter() + 1
        while (
            not self.stopping.is_set()
            and worker.process is not None
            and not worker.ending()
            and time.perf_counter() < deadline
        ):
            time.sleep(POLL)
        if not self.stopping.is_set():
            self.fail(lost_text(worker, worker.ending() or f"its connection ended ({error})"), worker=worker)

    def fail(self, text, fatal=True, worker=None):
        """Keep the first failure; a fatal one lets nobody wait any longer, also behind one that is not. For `check` to
        raise. worker: whose output belongs into the log.
        """
        with self.changed:
            first, ends = self.failure is None, fatal and not (self.failure and self.fatal)
            if first:
                self.failure = text
            self.fatal = fatal if first else self.fatal or fatal
            self.changed.notify_all()
        if first:
            log.error(
                "Sequence parallel: %s%s",
                text,
                "".join(f"\n  rank {worker.rank}: {line}" for line in worker.lines) if worker else "",
            )
        if ends:
            self.on_failure()
            # a wait in gloo ends when the other side ends too: also a rank that is idle has to
            for other in self.workers:
                if other.channel is not None:
                    quietly(other.channel.send, {"do": "end"})


def lost_text(worker, how):
    return f"{worker} is gone: {how}. The prompt was stopped; the next one starts the rank again."


def in_thread(function, *args, name):
    """The Thread, started, that runs a function."""
    thread = threading.Thread(target=function, args=args, name=f"flux2 ranks: {name}", daemon=True)
    thread.start()
    return thread


def quietly(function, *args):
    try:
        function(*args)
    except OSError:
        pass
