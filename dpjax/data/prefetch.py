"""Host batches made ahead of their consumer by a background thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np

from dpjax.data.dataset import Dataset

__all__ = ["Prefetcher", "chunks"]

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """An iterator whose items another thread makes ahead; use it in a `with`, or close it.

    Args:
        iterable: may be infinite; it is advanced in the other thread only.
        size: how many items are ahead of the consumer, the one being made included; >= 1.

    Guarantees:
        Items come in order. An exception of the iterable reaches the consumer unchanged, after the
        items before it, with a note of which item failed. After `close` the thread has ended.

    Raises:
        ValueError: size < 1.
    """

    def __init__(self, iterable: Iterable[T], size: int = 2) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be >= 1.")
        # One worker keeps the order. It holds the iterator and not `self`, so a prefetcher that
        # nobody holds any more is collected, and its thread ends with it.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dpjax-prefetch")
        self._items = _numbered(iterable)
        self._ahead: deque[Future[T]] = deque()
        self._waited = 0.0
        self._first: float | None = None
        self._end: float | None = None
        for _ in range(size):
            self._ahead.append(self._worker.submit(next, self._items))

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._end is not None:
            raise StopIteration
        start = time.perf_counter()
        try:
            item = self._ahead.popleft().result()
        except BaseException:  # StopIteration is the end
            self.close()
            raise
        now = time.perf_counter()
        if self._first is None:
            self._first = now  # the wait for the first item is start-up, not idleness
        else:
            self._waited += now - start
        self._ahead.append(self._worker.submit(next, self._items))
        return item

    @property
    def idle_fraction(self) -> float:
        """Share of the consumer's time since its first item that it spent waiting for the next."""
        if self._first is None:
            return 0.0
        total = (self._end or time.perf_counter()) - self._first
        return min(self._waited / total, 1.0) if total > 0 else 0.0

    def close(self) -> None:
        """Drops the items that were made ahead and ends the thread; may be called twice."""
        self._end = self._end or time.perf_counter()
        self._ahead.clear()
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _numbered(iterable: Iterable[T]) -> Iterator[T]:
    """The items of an iterable, whose errors then say at which item they came up."""
    number = 0
    try:
        for item in iterable:
            yield item
            number += 1
    except Exception as error:
        error.add_note(f"while item {number} was being made ahead")
        raise


def chunks(
    dataset: Dataset, index_arrays: Iterable[np.ndarray], *, ahead: int = 2
) -> Prefetcher[dict[str, np.ndarray]]:
    """Reads a stream of physical chunks ahead of the step that needs them.

    Args:
        dataset: to read from.
        index_arrays: integers of any shape, e.g. [chunk] or [chunks, chunk], -1 is padding; all the
            steps of a run, in order. May be infinite.
        ahead: how many batches are made ahead.

    Returns:
        An iterator over {"input": [*indices.shape, *dataset.shape], "label": int32, "mask": bool},
        the last two of indices.shape; mask is False at padding. It has `idle_fraction` and `close`.
    """
    return Prefetcher(_batches(dataset, index_arrays), ahead)


def _batches(
    dataset: Dataset, index_arrays: Iterable[np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    for indices in index_arrays:
        indices = np.asarray(indices)
        yield {**dataset.get(indices), "mask": indices >= 0}
