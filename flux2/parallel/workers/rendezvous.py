"""The store through which ranks find one another when process groups are made, over the authenticated connections
between rank 0 and its workers.

torch's own TCPStore asks nobody for a secret: whoever reaches its port reads and overwrites the addresses by which gloo
and NCCL connect. So rank 0 keeps the values, and a worker asks for them by messages (channel.py). On top of both,
process_groups.py uses torch's interface of a store.

  store = RankZeroStore(rendezvous)      # rank 0; `rendezvous.answer(request)` is for the others
  store = WorkerStore(requests)          # a worker; `requests.receive` is told of each answer
"""

import base64
import itertools
import threading
import time

LONGEST_VALUE = 2**16  # bytes; NCCL's id has 128, an address of gloo about 200
MOST_VALUES = 2**16


class Rendezvous:
    """Rank 0's values: {key: bytes}."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def set(self, key, value):
        """ValueError when it does not fit."""
        with self.changed:
            if len(value) > LONGEST_VALUE or (key not in self.values and len(self.values) >= MOST_VALUES):
                raise ValueError("A value for the connection of the ranks is too long, or there are too many.")
            self.values[key] = value
            self.changed.notify_all()

    def add(self, key, amount):
        with self.changed:
            total = int(self.values.get(key, b"0")) + amount
            self.set(key, str(total).encode())
            return total

    def check(self, keys):
        with self.changed:
            return all(key in self.values for key in keys)

    def wait(self, keys, seconds):
        """Whether all keys had values within so many seconds."""
        with self.changed:
            return self.changed.wait_for(lambda: self.check(keys), seconds)

    def forget(self):
        """Drop all values, those of a connection that is no more."""
        with self.changed:
            self.values = {}

    def answer(self, request):
        """The result of a worker's request (answers.REQUESTS), in JSON. ValueError for values that do not fit."""
        kind = request["request"]
        if kind == "set":
            return self.set(request["key"], base64.b64decode(request["value"], validate=True))
        if kind == "add":
            return self.add(request["key"], request["value"])
        if kind == "check":
            return self.check(request["keys"])
        if kind == "wait":
            return self.wait(request["keys"], request["seconds"])
        with self.changed:
            return base64.b64encode(self.values[request["key"]]).decode() if request["key"] in self.values else None


class Requests:
    """A worker's side: requests to rank 0, answered out of order. send: of its channel."""

    def __init__(self, send):
        self.send, self.ids = send, itertools.count()
        self.results, self.changed = {}, threading.Condition()

    def receive(self, message):
        """An answer came; called by the thread that receives."""
        with self.changed:
            self.results[message["id"]] = message["result"]
            self.changed.notify_all()

    def ask(self, patience, request, check=lambda: None):
        """Rank 0's result for a request (answers.REQUESTS); RuntimeError when it takes longer than `patience` seconds.
        check() is called while this waits, and may raise.
        """
        number, deadline = next(self.ids), time.monotonic() + patience
        self.send({"id": number, **request})
        with self.changed:
            while number not in self.results:
                if time.monotonic() > deadline:
                    raise RuntimeError("Rank 0 did not answer this rank in time.")
                self.changed.wait(0.05)
                check()
            return self.results.pop(number)
