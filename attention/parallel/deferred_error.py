"""A rank that fails must not leave the others waiting: it takes part in the collectives left, and raises then."""


class DeferredError:
    """Runs the parts of a call that are not collectives. After the first exception of any kind nothing is run any more;
    `check` raises it.
    """

    def __init__(self):
        self.error = None

    def __call__(self, function, otherwise=None):
        """What function() returns; `otherwise` when it raises or something before it did."""
        if self.error is None:
            try:
                return function()
            except BaseException as error:  # a cancel and a Ctrl+C too: the other ranks are waiting for this one
                self.error = error
        return otherwise

    def check(self):
        """Raises the exception that was kept, if there is one."""
        if self.error is not None:
            raise self.error
