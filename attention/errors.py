"""Errors whose text is for the user, with the section of the documentation that explains them."""


class Explained:
    """An error that knows its section. topic: a heading's anchor in docs/troubleshooting.md; "" for none.

    A class of errors sets it once; one that is raised for several causes hands it over.
    """

    topic = ""


class UserError(Explained, ValueError):
    """What the user gave does not work: what was expected, what was found, what to do, in sentences."""

    def __init__(self, text, topic=""):
        super().__init__(text)
        if topic:
            self.topic = topic


MEMORY = ("out of memory", "can't allocate memory", "OUT_OF_MEMORY")  # PyTorch on GPUs, on a CPU, and its libraries


def is_out_of_memory(error):
    """True for an error that says that memory is short, whichever library raises it: it may pass."""
    return isinstance(error, MemoryError) or any(
        words in f"{type(error).__name__}: {error}" for words in (*MEMORY, "OutOfMemoryError")
    )


def explained(error, topic):
    """The same error with its section, for types that cannot take it: `raise explained(RuntimeError(text), topic)`."""
    error.topic = topic
    return error


def first_line(error):
    """The first line of an error's text, or its type where it has none, as Python's own MemoryError."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
