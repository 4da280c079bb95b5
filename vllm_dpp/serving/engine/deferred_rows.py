"""The workers' buffer for ranges that are read over several steps, as the scheduler lends it out.

Only numbers: which rows a request gets is the worker's business (``worker.range_buffer``). A worker
takes rows when it stores the first of a range and gives them back when the range is decided or the
request leaves, which it hears of before the next step runs; so what is lent here is always there.
"""


class DeferredRows:
    """Counts the rows that are lent.

    First come, first served: once a request has been refused in a step, nobody behind it gets rows
    in that step, or short videos could overtake a long one for ever. Those that hold rows are
    running and need no more of them to reach their decision, so everybody's turn comes.

    Args:
        capacity: Rows of the buffer.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held: dict[str, int] = {}
        self._refused = False
        self._waiting: set[str] = set()
        self._num_waits = 0

    def fits(self, request_id: str, num_rows: int) -> bool:
        """Whether a request may hold ``num_rows`` in all; if not, nor may those behind it."""
        more = num_rows - self.held.get(request_id, 0)
        if more <= 0:
            return True
        self._refused = self._refused or more > self.capacity - sum(self.held.values())
        if self._refused and request_id not in self._waiting:
            self._waiting.add(request_id)
            self._num_waits += 1
        if not self._refused:
            self._waiting.discard(request_id)
        return not self._refused

    def lend(self, request_id: str, num_rows: int) -> bool:
        """Let a request hold ``num_rows`` in all, if they fit."""
        fits = self.fits(request_id, num_rows)
        if fits and num_rows > self.held.get(request_id, 0):
            self.held[request_id] = num_rows
        return fits

    def settle(self, request_id: str, num_rows: int) -> None:
        """Take back all but ``num_rows``."""
        if num_rows:
            self.held[request_id] = num_rows
        else:
            self.held.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """A request has left."""
        self.settle(request_id, 0)
        self._waiting.discard(request_id)

    def take_waits(self) -> int:
        """How many requests have begun to wait since the last call."""
        num_waits, self._num_waits = self._num_waits, 0
        return num_waits

    def end_step(self) -> None:
        """Those who were refused may ask again."""
        self._refused = False
