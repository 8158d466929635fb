"""What workers may say to rank 0, word by word. A message that is not in these tables is refused: ValueError, a
sentence.

A worker may be on another host and of another version, and what it sends is used as numbers and in texts.
"""

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
ALIVE = {"alive": True}
CAUSES = ("memory", "interrupted", "exchange", "error")
NUMBER, NONE = (int, float), type(None)
INTRODUCTION = {"is": str, "rank": (int, NONE), "pid": int, "host": str, "local_rank": int}
DONE = {
    "configure": {"versions": {str: str}, "name": str},
    "load": {"seconds": NUMBER, "bytes": int, "digest": str},
    "weights": {"patched": int},
    "finish": {"times": {str: (*NUMBER, list)}, "attention": {str: int}},
    "drop": {"freed": bool},
    "room": {"free": (int, NONE), "total": (int, NONE)},
}
FAILED = {"cause": str, "text": str, "broken": bool}
REQUESTS = {  # to rank 0, answered while both compute: the store (rendezvous.py) and kernel_choice.py
    "kernel": {"kernel": str, "signature": list, "lengths": list},
    "set": {"key": str, "value": str},
    "get": {"key": str},
    "add": {"key": str, "value": int},
    "check": {"keys": list},
    "wait": {"keys": list, "seconds": NUMBER},
}


def check_introduction(message):
    """The first message of a worker."""
    check_fields(message, INTRODUCTION, "an introduction")
    if len(message["host"]) > 255:
        raise ValueError("The name of its host is longer than 255 characters.")


def check(message, tensors, last):
    """A later message. last: number of the last thing that was asked for."""
    if not isinstance(message, dict) or tensors:
        raise ValueError("It is not a table of values.")
    if "request" in message:
        check_fields(message, {"id": int, **known(REQUESTS, message["request"], "request")}, "a request")
        if not all(type(length) is int for length in message.get("lengths", ())):
            raise ValueError("In a request, 'lengths' are no numbers.")
        return
    kind = "done" if "done" in message else "failed"
    what = message.get(kind)
    known(WORK, what, "work")
    check_fields(
        message, {"number": int, **(DONE.get(what, {}) if kind == "done" else FAILED)}, f"an answer to '{what}'"
    )
    if message["number"] > last:
        raise ValueError(f"It answers what was not asked: number {message['number']} of {last}.")
    if kind == "failed" and message["cause"] not in CAUSES:
        raise ValueError(f"'{message['cause'][:40]}' is no cause of a failure.")


def known(table, name, what):
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"'{str(name)[:40]}' is no {what} that is known.")
    return table[name]


def check_fields(message, fields, what):
    """ValueError unless a message is a dict with these fields of these types; bool is no number."""
    if not isinstance(message, dict):
        raise ValueError(f"It is not {what}.")
    for name, kind in fields.items():
        value = message.get(name)
        if isinstance(kind, dict):
            ((keys, kind),) = kind.items()
            right = isinstance(value, dict) and all(type(k) is keys and of_type(v, kind) for k, v in value.items())
        else:
            right = name in message and of_type(value, kind)
        if not right:
            raise ValueError(f"In {what}, '{name}' is missing or of another type.")


def of_type(value, kinds):
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return type(value) in kinds
