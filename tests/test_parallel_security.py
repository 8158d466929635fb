"""What somebody on the network between rank 0 and a worker can do, and what a worker can be told: SECURITY.md's
promises.

A relay that passes the handshake on and then changes, repeats, reorders, leaves out or returns what it carries;
strangers who use up connections; workers who answer nonsense; loaders and number formats that are in no table. The
tensors that gloo and NCCL exchange are authenticated by nobody, and nothing here says that they are.
"""

import json
import os
import socket
import struct
import threading
import time

import pytest
import torch

from test_ranks import free_port, introduce, pool_waiting_for_one, tools, what_is_edited_while_the_tests_run  # noqa: F401

SECRET = "a secret of some length"


# --- the connection --------------------------------------------------------------------------------------------------


class Relay:
    """Somebody between a worker and rank 0. frames: what each side sent since the handshake, as it was cut up; nothing
    of it is passed on by itself.
    """

    def __init__(self, tools):
        self.near, self.far = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
        found = {}
        threads = [
            threading.Thread(target=lambda: found.update(server=tools.channel.accept(self.near.accept()[0], SECRET))),
            threading.Thread(target=lambda: found.update(client=tools.channel.connect(self.far.getsockname(), SECRET))),
        ]
        for thread in threads:
            thread.start()
        self.to_server = socket.create_connection(self.near.getsockname())
        self.to_client = self.far.accept()[0]
        for size in (64, 32):  # greeting and nonce, then the proof
            self.to_server.sendall(self.read(self.to_client, size))
            self.to_client.sendall(self.read(self.to_server, size))
        for thread in threads:
            thread.join(10)
        self.server, self.client = found["server"], found["client"]

    @staticmethod
    def read(sock, size):
        data = b""
        while len(data) < size:
            data += sock.recv(size - len(data))
        return data

    def frame(self, sock):
        """A header as one side sent it: length, bytes, tag."""
        length = self.read(sock, 8)
        return length + self.read(sock, struct.unpack(">Q", length)[0] + 32)

    def close(self):
        for one in (self.near, self.far, self.to_server, self.to_client):
            one.close()
        self.server.close(), self.client.close()


@pytest.fixture
def relay(tools):  # noqa: F811
    made = Relay(tools)
    yield made
    made.close()


def test_what_is_passed_on_unchanged_arrives(relay):
    relay.server.send({"do": "load", "number": 1}, [torch.arange(6).view(2, 3), torch.ones(2, dtype=torch.bfloat16)])
    header = relay.frame(relay.to_server)
    relay.to_client.sendall(header + relay.read(relay.to_server, 48 + 32 + 4 + 32))
    message, (first, second) = relay.client.receive()
    assert message == {"do": "load", "number": 1} and first.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert second.dtype == torch.bfloat16 and second.tolist() == [1, 1]


def changed(frames, relay):
    at = frames[0].index(b"number")
    return [frames[0].replace(b"number", b"numbex")] if at else []


ATTACKS = {
    "changed": changed,
    "a changed tag": lambda frames, relay: [frames[0][:-1] + bytes([frames[0][-1] ^ 1])],
    "repeated": lambda frames, relay: [frames[0], frames[0]],
    "reordered": lambda frames, relay: [frames[1], frames[0]],
    "left out": lambda frames, relay: [frames[1]],
    "injected": lambda frames, relay: [frames[0], injected()],
    "injected without a tag": lambda frames, relay: [injected()[:-32] + frames[0][-32:]],
}


def injected():
    source = {"module": "os", "function": "system", "arguments": ["id"], "in_pack": False, "index": None}
    header = json.dumps({"message": {"do": "load", "number": 9, "source": source}, "tensors": []}).encode()
    return struct.pack(">Q", len(header)) + header + b"\0" * 32


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_not_what_the_other_end_sent_closes_the_connection(relay, tools, attack):  # noqa: F811
    for number in (1, 2):
        relay.server.send({"do": "room", "number": number})
    frames = [relay.frame(relay.to_server) for _ in range(2)]
    sent = ATTACKS[attack](frames, relay)
    relay.to_client.sendall(b"".join(sent))
    honest = next((at for at, frame in enumerate(sent) if at >= 2 or frame != frames[at]), len(sent))
    for number in range(honest):
        assert relay.client.receive()[0] == {"do": "room", "number": number + 1}
    with pytest.raises(tools.channel.Closed, match="not what the other end sent"):
        relay.client.receive()


def test_what_one_end_sent_cannot_be_sent_back_to_it(relay, tools):  # noqa: F811
    relay.server.send({"do": "room", "number": 1})
    relay.to_server.sendall(relay.frame(relay.to_server))
    with pytest.raises(tools.channel.Closed, match="not what the other end sent"):
        relay.server.receive()


def test_a_message_of_another_connection_is_refused(tools):  # noqa: F811
    first, second = Relay(tools), Relay(tools)
    try:
        first.server.send({"do": "room", "number": 1})
        second.to_client.sendall(first.frame(first.to_server))
        with pytest.raises(tools.channel.Closed, match="not what the other end sent"):
            second.client.receive()
    finally:
        first.close(), second.close()


def test_a_tensor_that_is_changed_on_the_way_is_refused(relay, tools):  # noqa: F811
    relay.server.send({"do": "weights", "number": 1}, [torch.zeros(4)])
    header, data = relay.frame(relay.to_server), relay.read(relay.to_server, 16 + 32)
    relay.to_client.sendall(header + b"\1" + data[1:])
    with pytest.raises(tools.channel.Closed, match="not what the other end sent"):
        relay.client.receive()


@pytest.mark.parametrize(
    "kind",
    [
        ["load", [2]],
        ["__builtins__", [1]],
        ["float32", [-1]],
        ["float32", [2**60]],
        ["float32", "2"],
        ["float32"],
        "x",
        3,
    ],
)
def test_number_formats_and_shapes_come_from_tables(tools, kind):  # noqa: F811
    from flux2_pack.flux2.parallel.workers import dtypes

    with pytest.raises((ValueError, TypeError)):
        dtypes.empty(kind)
    with pytest.raises((ValueError, TypeError)):
        tools.serialize.restore({"$": ["dtype", "load"]}, [])


# --- what a worker may be told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        {"module": "os", "function": "system", "arguments": ["true"], "in_pack": False, "index": None},
        {"loader": "os.system", "arguments": ["true"], "index": None},
        {"loader": ["comfy.sd", "load_diffusion_model"], "arguments": [], "index": None},
    ],
)
def test_a_worker_loads_only_what_its_own_table_names(tools, source, monkeypatch):  # noqa: F811
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises((tools.replica.NotReplicable, KeyError, TypeError)):
        tools.replica.load(source)
    assert not ran


def test_what_a_worker_does_is_a_table(tools):  # noqa: F811
    from flux2_pack.flux2.parallel.workers import worker

    assert set(worker.IN_TURN) == set(tools.answers.WORK) and set(worker.AT_ONCE) == {"interrupt", "end", "answer"}


# --- before the secret is proven -------------------------------------------------------------------------------------


def threads_of_strangers():
    return sum(thread.name == "flux2 ranks: handshake" for thread in threading.enumerate())


def test_strangers_hold_up_few_threads_and_for_a_short_time(tools, monkeypatch):  # noqa: F811
    """A connection that says one byte now and then is ended by the same deadline as one that says nothing."""
    monkeypatch.setattr(tools.pool, "HANDSHAKE", 1.5)
    pool, port = pool_waiting_for_one(tools, monkeypatch)
    strangers, most = [], 0
    try:
        for _ in range(150):
            strangers.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            most = max(most, threads_of_strangers())
        begun = time.monotonic()
        while time.monotonic() - begun < 3:
            for one in strangers:
                try:
                    one.sendall(b"f")
                except OSError:
                    pass
            most = max(most, threads_of_strangers())
            time.sleep(0.2)
            if time.monotonic() - begun > 2.5:
                break
        assert most <= tools.pool.UNPROVEN
        deadline = time.monotonic() + 10
        while threads_of_strangers() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not threads_of_strangers()
        channel = introduce(tools, port)
        assert channel.receive()[0]["do"] == "configure"
    finally:
        for one in strangers:
            one.close()
        pool.stop()


@pytest.mark.parametrize(
    "message",
    [
        [],
        {"is": "here"},
        {"is": "here", "rank": "1", "pid": 1, "host": "far", "local_rank": 0},
        {"is": "here", "rank": None, "pid": 1, "host": "f" * 300, "local_rank": 0},
        {"is": "here", "rank": None, "pid": 1, "host": ["far"], "local_rank": 0},
    ],
    ids=str,
)
def test_an_introduction_that_is_none_is_refused_and_the_next_one_is_heard(tools, monkeypatch, message):  # noqa: F811
    pool, port = pool_waiting_for_one(tools, monkeypatch)
    try:
        channel = tools.channel.connect(("127.0.0.1", port), SECRET, timeout=5)
        channel.send(message)
        with pytest.raises(tools.channel.Closed):
            channel.receive()
        assert introduce(tools, port).receive()[0]["do"] == "configure"
    finally:
        pool.stop()


VERSIONS = {"done": "configure", "number": 1, "versions": {}, "name": "GPU"}
NONSENSE = {
    "no table": [1, 2],
    "a text": "done",
    "nothing": {},
    "unknown work": {"done": "fly", "number": 1},
    "a number that is text": {**VERSIONS, "number": "1"},
    "a number that was never asked": {**VERSIONS, "number": 99},
    "no name": {"done": "configure", "number": 1, "versions": {}},
    "versions that are numbers": {**VERSIONS, "versions": {"PyTorch": 2}},
    "a cause that is none": {"failed": "configure", "number": 1, "cause": "bored", "text": "", "broken": False},
    "a text that is a list": {"failed": "configure", "number": 1, "cause": "error", "text": [], "broken": False},
    "a request that is none": {"request": "delete", "id": 1, "key": "x"},
    "a request without a number": {"request": "get", "key": "x"},
    "lengths that are texts": {"request": "kernel", "id": 1, "kernel": "auto", "signature": [], "lengths": ["1", "2"]},
}


@pytest.mark.parametrize("what", NONSENSE)
def test_an_answer_that_is_none_ends_the_prompt_with_a_sentence(tools, monkeypatch, what):  # noqa: F811
    pool, port = pool_waiting_for_one(tools, monkeypatch)
    try:
        channel = introduce(tools, port)
        channel.receive()
        channel.send(NONSENSE[what])
        begun = time.monotonic()
        with pytest.raises(tools.pool.RanksFailed, match="Rank 1 .far GPU 0.* sent what is no answer"):
            pool.done("configure", 1, 20)
        assert time.monotonic() - begun < 10
    finally:
        pool.stop()


def test_json_that_is_too_deep_or_too_long_ends_the_prompt_with_a_sentence(tools, monkeypatch):  # noqa: F811
    for header in (b"[" * 100_000, b" " * (2**20 + 1)):
        pool, port = pool_waiting_for_one(tools, monkeypatch, free_port())
        try:
            channel = introduce(tools, port)
            channel.receive()
            channel.socket.sendall(struct.pack(">Q", len(header)) + header + channel._out.tag(header))
            with pytest.raises(tools.pool.RanksFailed, match="Rank 1"):
                pool.done("configure", 1, 20)
        finally:
            pool.stop()


# --- how the ranks find one another ----------------------------------------------------------------------------------


def test_the_store_by_which_ranks_find_one_another_has_no_port(tools):  # noqa: F811
    """torch's TCPStore asks nobody for a secret, so there is none."""
    from flux2_pack.flux2.parallel.workers import process_groups, rendezvous

    store = process_groups.RankZeroStore(rendezvous.Rendezvous())
    store.set("key", b"value")
    assert store.get("key") == b"value" and store.add("count", 2) == 2 and store.check(["key", "count"])
    with pytest.raises(RuntimeError, match="did not connect within"):
        process_groups.RankZeroStore.wait(store, ["nobody"], process_groups.timedelta(seconds=0.2))
    with pytest.raises(ValueError, match="too long"):
        store.values.set("long", b"x" * (rendezvous.LONGEST_VALUE + 1))


def test_nccl_and_gloo_keep_to_the_interface_of_the_address(tools):  # noqa: F811
    from flux2_pack.flux2.parallel.workers import process_groups, rendezvous

    groups = process_groups.ProcessGroups(
        process_groups.RankZeroStore(rendezvous.Rendezvous()), "prefix", 0, "cpu", "127.0.0.1"
    )
    assert groups._interface("NCCL_SOCKET_IFNAME") == {"NCCL_SOCKET_IFNAME": "=lo"}
    assert process_groups.interface_of("203.0.113.1") is None
