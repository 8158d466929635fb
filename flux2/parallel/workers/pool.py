"""The worker processes of a group, as rank 0 sees them: started, greeted, told what to do, watched, ended.

  crew = Crew(plan, device_names...)
  crew.start()                                 # returns at once
  number = crew.ask("load", source=...)        # tell every worker
  answers = crew.done("load", number, 600)     # wait for all of them: {rank: what it answered}; raises what went wrong
                                               on any
  crew.stop()                                  # ends every process and waits until it is gone

Threads: one keeper starts the processes (Linux ends a worker with the thread that started it) and lives as long as they
do; one reader per worker receives. What they find wrong becomes `failure`, whose first text is kept, and is raised in
the main thread by the next `done` or `check`.
"""

from dataclasses import dataclass, field
import logging
import secrets
import threading
import time

from . import versions, launch, channel as protocol

log = logging.getLogger(__name__)
STARTING, REMOTE_STARTING = 180, 600  # seconds until every process has reported
POLL, LOOK = 0.05, 0.5  # seconds between looks at the processes while a prompt runs, and otherwise
SUSPICION = 2.0  # seconds after one rank's exchange failed in which the rank that is the reason should be known
RECOVERABLE = ("forward", "options", "weights")  # work that may fail on a rank and leave it usable
WORK = {
    "configure": "start",
    "load": "load the model",
    "mesh": "connect to the other ranks",
    "weights": "take over the LoRA weights",
    "options": "take over the model's options",
    "forward": "compute its part of a step",
    "finish": "end the sampling",
    "drop": "free its memory",
    "room": "say how much memory is free",
}
LESS_MEMORY = "Use fewer pixels or references, an fp8 checkpoint, or GPUs with more memory."


class RanksFailed(RuntimeError):
    """Another rank is gone or could not do its part. The text names the rank."""


@dataclass(frozen=True)
class Plan:
    """Who takes part: ulysses * ring ranks. device: "cuda" or "cpu". gpus: index in this process of each rank on this
    machine, rank 0's first; None for the CPU. elsewhere: ranks that join from other hosts. head_groups: see
    attention/parallel/mesh.py; 1 exchanges all heads of an attention call at once.
    """

    ulysses: int
    ring: int
    device: str
    gpus: tuple
    elsewhere: int = 0
    head_groups: int = 1

    @property
    def size(self):
        return self.ulysses * self.ring

    def mesh(self):
        """The arguments of make_mesh that are a matter of choice."""
        return {"ulysses": self.ulysses, "ring": self.ring, "head_groups": self.head_groups}

    def processes(self):
        """What has to be equal for two plans to use the same processes."""
        return self.size, self.device, self.gpus, self.elsewhere


@dataclass
class Member:
    """A worker. done: {what: (number of the last one, what it answered)}; lines: the end of its output."""

    rank: int
    where: str
    process: object = None
    channel: protocol.Channel = None
    local_rank: int = 0
    address: str = launch.LOOPBACK
    device: str = ""
    pid: int = 0
    done: dict = field(default_factory=dict)
    lines: list = field(default_factory=list)

    def __str__(self):
        return f"Rank {self.rank} ({self.where}{', ' + self.device if self.device else ''})"

    def ending(self):
        """How its process ended, with its last words unless it was killed; "" while it runs or when it is on another
        host.
        """
        how = launch.ending_of(self.process) if self.process is not None else ""
        words = [line.strip() for line in self.lines if line.strip()][-1:]
        return f"{how}. Its last words: {words[0][:300]}" if words and "status" in how else how


class Crew:
    """See the module's text. on_failure(): called once, from any thread, when nobody can be waited for any more.
    look_after(): called by the keeper now and then.
    """

    def __init__(self, plan, on_failure=lambda: None, look_after=lambda: None):
        self.plan, self.on_failure, self.look_after = plan, on_failure, look_after
        self.members, self.failure, self.fatal, self.busy = [], None, False, False
        self.changed, self.stopping = threading.Condition(), threading.Event()
        self.open = False
        self._number, self._suspect, self._keeper = 0, None, None

    @property
    def started(self):
        """Whether the processes run, as far as is known."""
        return self._keeper is not None and not self.stopping.is_set() and not (self.failure and self.fatal)

    # --- starting and ending

    def start(self):
        """Start the processes. OSError or ValueError with a sentence when rank 0 cannot listen."""
        host, port, self.open = launch.listening_at()
        self.secret = launch.os.environ[launch.SECRET] if self.open else secrets.token_hex(32)
        self._listening = launch.listen(host, port)
        self.began = time.perf_counter()
        self._keeper = threading.Thread(target=self._keep, name="flux2 ranks: keeper", daemon=True)
        self._keeper.start()

    def stop(self, patience=8):
        """End every process and wait until they are gone. Nothing can be asked afterwards."""
        self.stopping.set()
        if self._keeper is not None and self._keeper is not threading.current_thread():
            self._keeper.join(patience)

    def _keep(self):
        """The keeper thread. What it starts ends with it."""
        try:
            self._start_processes()
            self._welcome_all()
            while not self.stopping.wait(POLL if self.busy else LOOK):
                self._look()
                self.look_after()
        except Exception as error:
            said = isinstance(error, RanksFailed)
            self.fail(str(error) if said else f"The other ranks could not be started: {type(error).__name__}: {error}")
        finally:
            self._end([member.process for member in self.members if member.process is not None])

    def _start_processes(self):
        address = self._listening.getsockname()[:2]
        for rank in range(1, self.plan.size - self.plan.elsewhere):
            gpu = self.plan.gpus[rank]
            process = launch.start(rank, self.plan.size, gpu, address, self.secret, self.plan.size)
            member = Member(rank, "this machine's CPU" if gpu is None else f"cuda:{gpu}", process, pid=process.pid)
            self.members = [*self.members, member]
            in_thread(self._hear, member, name=f"output of rank {rank}")

    def _hear(self, member):
        """A worker's output: kept for the text of a failure, and in ComfyUI's log at its debug level."""
        for line in member.process.stdout:
            member.lines = [*member.lines[-30:], line.rstrip()]
            log.debug("rank %d: %s", member.rank, line.rstrip())

    def _look(self):
        """Raise for a process that ended, and for an exchange that failed without anybody to blame."""
        for member in self.members:
            if member.ending() and not self.stopping.is_set():
                self.fail(gone(member, member.ending()), member=member)
                raise RanksFailed(self.failure)
        if self._suspect and time.perf_counter() - self._suspect[0] > SUSPICION:
            raise RanksFailed(self._suspect[1])

    def _end(self, processes):
        self.stopping.set()
        self._listening.close()
        self.on_failure()
        for member in self.members:
            if member.channel is not None:
                quietly(member.channel.send, {"do": "stop"})
        launch.end(processes, 0.3 if self.failure or self.busy else 2.0)  # busy: a cancelled prompt is waiting for this
        for member in self.members:
            if member.channel is not None:
                member.channel.close()
        with self.changed:
            self.changed.notify_all()

    # --- greeting

    def _welcome_all(self):
        """Accept connections until everybody is here. Each is greeted in a thread of its own, so that a stranger who
        says
        nothing delays nobody.
        """
        self._listening.settimeout(0.2)
        arrivals = []
        while not self.stopping.is_set() and self._awaited(arrivals):
            self._look()
            if time.perf_counter() - self.began > (REMOTE_STARTING if self.plan.elsewhere else STARTING):
                raise RanksFailed(self._awaited(arrivals))
            try:
                sock, peer = self._listening.accept()
            except TimeoutError:
                continue
            in_thread(self._greet, sock, peer[0], arrivals, name="greeting")
        self._listening.close()
        for offset, member in enumerate(sorted(arrivals, key=lambda one: (one.where, one.local_rank))):
            member.rank = self.plan.size - self.plan.elsewhere + offset
            self.members = [*self.members, member]
            self._admit(member)

    def _awaited(self, arrivals):
        """Who is not here yet, as a sentence; "" when everybody is."""
        late = [str(member) for member in self.members if member.channel is None]
        if late:
            return f"{', '.join(late)} did not report within {STARTING} seconds."
        if len(arrivals) < self.plan.elsewhere:
            return (
                f"{len(arrivals)} of {self.plan.elsewhere} ranks on other hosts joined within {REMOTE_STARTING} "
                "seconds. Start the workers there with torchrun (see docs/several-gpus.md), with this host's "
                f"{launch.LISTEN} as --join and the same {launch.SECRET}."
            )
        return ""

    def _greet(self, sock, peer, arrivals):
        """One connection: it proves that it knows the secret and says who it is, or is refused."""
        try:
            channel = protocol.welcome(sock, self.secret)
            here, _ = channel.receive()
        except OSError as error:
            log.warning("Sequence parallel refused a connection from %s: %s", peer, error)
            return
        expected = [
            member
            for member in self.members
            if member.rank == here["rank"] and member.pid == here["pid"] and member.channel is None
        ]
        if expected:
            expected[0].channel = channel
            self._admit(expected[0])
        elif here["rank"] is None and len(arrivals) < self.plan.elsewhere:
            arrivals.append(
                Member(
                    0,
                    f"{here['host']} GPU {here['local_rank']}",
                    None,
                    channel,
                    here["local_rank"],
                    peer,
                    pid=here["pid"],
                )
            )
        else:
            log.warning("Sequence parallel needs no rank from %s: all are there.", peer)
            channel.close()

    def _admit(self, member):
        in_thread(self._read, member, name=f"rank {member.rank}")
        self._tell(
            member,
            {
                "do": "configure",
                "number": 1,
                "rank": member.rank,
                "device": self.plan.device,
                **versions.configuration(),
            },
        )

    # --- messages

    def ask(self, what, tensors=(), each=lambda member: {}, **content):
        """Tell every worker to do something; returns its number, for `done`. each(member): content for one of them."""
        with self.changed:
            self._number += 1
            number = self._number
        messages = [(member, {"do": what, "number": number, **content, **each(member)}) for member in self.members]
        if not tensors:
            for member, message in messages:
                self._tell(member, message)
            return number
        for thread in [
            in_thread(self._tell, member, message, tensors, name=f"telling rank {member.rank}")
            for member, message in messages
        ]:
            thread.join()  # gigabytes of a LoRA go to all ranks at the same time
        return number

    def tell(self, message):
        """Say something to every worker that is not answered."""
        for member in self.members:
            self._tell(member, message)

    def _tell(self, member, message, tensors=()):
        try:
            member.channel.send(message, tensors)
        except OSError as error:
            self._lost(member, error)

    def done(self, what, number, patience, wait=lambda waiting: None):
        """Wait until every worker has done `number`; returns their answers by rank. wait(how many are awaited) is
        called
        meanwhile and may raise (a cancel).
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
                return {member.rank: member.done[what][1] for member in self.members}
            if time.perf_counter() > deadline:
                raise RanksFailed(f"{', '.join(waiting)} did not {WORK[what]} within {patience:g} seconds.")
            wait(len(waiting))

    def _waiting(self, what, number):
        absent = [f"{self.plan.size - 1 - len(self.members)} ranks that have not joined"] * (
            len(self.members) < self.plan.size - 1
        )
        return [str(member) for member in self.members if member.done.get(what, (0,))[0] < number] + absent

    def check(self):
        """Raise what went wrong on another rank. After something fatal every process is ended; else the crew goes
        on.
        """
        if self.failure is None and self.started:
            return
        text = self.failure or "The other ranks were stopped. The next prompt starts them again."
        self.failure = self.failure if self.fatal else None
        if self.fatal or not self.started:
            self.stop()
        raise RanksFailed(text)

    # --- readers

    def _read(self, member):
        try:
            while True:
                message, _ = member.channel.receive()
                self._note(member, message)
        except OSError as error:
            self._lost(member, error)

    def _note(self, member, message):
        what = message.get("done") or message.get("failed")
        if "failed" in message:  # first: whoever waits for it to be done must find the failure
            self._blame(member, what, message)
        elif what == "configure":
            member.device = message["name"]
            wrong = versions.different(versions.versions(), message["versions"])
            if wrong:
                self.fail(
                    f"{member} cannot work with rank 0: {'; '.join(wrong)}. Install the same versions on every host, "
                    "and restart ComfyUI after "
                    "an update."
                )
        with self.changed:
            member.done[what] = (message["number"], message)
            self.changed.notify_all()

    def _blame(self, member, what, message):
        text = f"{member} could not {WORK[what]}: {message['text'].rstrip('.')}."
        if message["cause"] == "exchange":  # somebody else is the reason, and will be known soon
            self._suspect = self._suspect or (time.perf_counter(), text)
        elif message["cause"] != "interrupted" or message["broken"]:
            text += f" {LESS_MEMORY}" if message["cause"] == "memory" else ""
            self.fail(text, fatal=message["broken"] or what not in RECOVERABLE, member=member)

    def _lost(self, member, error):
        """The connection to a worker ended: find out why, unless it was us."""
        deadline = time.perf_counter() + 1
        while (
            not self.stopping.is_set()
            and member.process is not None
            and not member.ending()
            and time.perf_counter() < deadline
        ):
            time.sleep(POLL)
        if not self.stopping.is_set():
            self.fail(gone(member, member.ending() or f"its connection ended ({error})"), member=member)

    def fail(self, text, fatal=True, member=None):
        """Keep the first failure; a fatal one lets nobody wait any longer, also behind one that is not. For `check` to
        raise. member: whose output belongs into the log.
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
                "".join(f"\n  rank {member.rank}: {line}" for line in member.lines) if member else "",
            )
        if ends:
            self.on_failure()
            # a wait in gloo ends when the other side ends too: also a rank that is idle has to
            for other in self.members:
                if other.channel is not None:
                    quietly(other.channel.send, {"do": "end"})


def gone(member, how):
    return f"{member} is gone: {how}. The prompt was stopped; the next one starts the rank again."


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
