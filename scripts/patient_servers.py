"""A pytest plugin for ComfyUI's own suites, used by comfyui_suites.py: a ComfyUI server that a test starts is waited
for until it answers.

The suites wait about twenty seconds, which a busy machine does not keep. Nothing else changes: a server that ends or
stays silent is left to the test.
"""

import socket
import subprocess
import time

SECONDS = 240


class Patient(subprocess.Popen):
    """subprocess.Popen that returns when the program listens on the port it was given."""

    def __init__(self, args, *rest, **options):
        port = port_of(args)
        if port:  # the server before it, which the test has just killed, may still be there
            wait_until(lambda: not answers(port))
        super().__init__(args, *rest, **options)
        if port:
            wait_until(lambda: self.poll() is not None or answers(port))


def port_of(args):
    """The port of a command that starts ComfyUI, or None for another command."""
    words = [str(word) for word in args] if isinstance(args, (list, tuple)) else []
    starts = any(word.endswith("main.py") for word in words) and "--port" in words
    return int(words[words.index("--port") + 1]) if starts else None


def answers(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(true):
    deadline = time.monotonic() + SECONDS
    while not true() and time.monotonic() < deadline:
        time.sleep(0.2)


subprocess.Popen = Patient
