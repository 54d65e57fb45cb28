"""Prepares host batches in a background thread, ahead of their consumer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import numpy as np

from dpjax.data.dataset import Dataset

__all__ = ["Prefetcher", "read_ahead"]

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """An iterator whose items another thread computes ahead; use it in a `with`, or close it.

    Args:
        iterable: may be infinite; only the other thread advances it.
        size: number of items ahead of the consumer, including the one being computed; >= 1.

    Guarantees:
        Items come in order. An exception of the iterable reaches the consumer unchanged, after the
        items before it, with a note that says which item failed. After `close` the thread has
        ended.

    Raises:
        ValueError: size < 1.
    """

    def __init__(self, iterable: Iterable[T], size: int = 2) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be >= 1.")
        # One worker keeps the order. It refers to the iterator, not to `self`, so an abandoned
        # prefetcher is garbage-collected, and its thread ends with it.
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
            self._first = now  # waiting for the first item is start-up, not idle time
        else:
            self._waited += now - start
        self._ahead.append(self._worker.submit(next, self._items))
        return item

    @property
    def idle_fraction(self) -> float:
        """Share of the time since the first item that the consumer spent waiting for items."""
        if self._first is None:
            return 0.0
        total = (self._end or time.perf_counter()) - self._first
        return min(self._waited / total, 1.0) if total > 0 else 0.0

    def close(self) -> None:
        """Drops the items computed ahead and ends the thread; may be called twice."""
        self._end = self._end or time.perf_counter()
        self._ahead.clear()
        self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _numbered(iterable: Iterable[T]) -> Iterator[T]:
    """Yields the items of an iterable, and notes on an error which item raised it."""
    number = 0
    try:
        for item in iterable:
            yield item
            number += 1
    except Exception as error:
        error.add_note(f"while item {number} was being computed ahead")
        raise


def read_ahead(
    dataset: Dataset, index_arrays: Iterable[np.ndarray], *, ahead: int = 2
) -> Prefetcher[dict[str, np.ndarray]]:
    """Reads a stream of physical chunks ahead of the step that needs them.

    Args:
        dataset: data set to read from.
        index_arrays: integers of any shape, e.g. [chunk] or [chunks, chunk], -1 is padding; for all
            steps of a run, in order. May be infinite.
        ahead: number of batches to prepare ahead.

    Returns:
        An iterator over {"input": [*indices.shape, *dataset.shape], "label": int32, "mask": bool}.
        Label and mask have the shape of the indices; the mask is False at padding. It has
        `idle_fraction` and `close`.
    """
    return Prefetcher(_batches(dataset, index_arrays), ahead)


def _batches(
    dataset: Dataset, index_arrays: Iterable[np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    for indices in index_arrays:
        indices = np.asarray(indices)
        yield {**dataset.get(indices), "mask": indices >= 0}
