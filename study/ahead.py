"""One thing ahead: the next of a sequence is made in a thread while this one is at work."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls ``make`` with the next number, below ``stop``, as soon as one is asked for."""

    def __init__(self, make: Callable[[int], T], stop: float) -> None:
        self.make, self.stop = make, stop
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="study-ahead")
        self.coming: tuple[int, Future] | None = None

    def __call__(self, number: int) -> T:
        """What belongs to a number; it is ready if the one before it was asked for last."""
        if self.coming is not None and self.coming[0] == number:
            made = self.coming[1].result()
        else:
            made = self.make(number)
        self.coming = None
        if number + 1 < self.stop:
            self.coming = number + 1, self.pool.submit(self.make, number + 1)
        return made
