"""Host batches made ahead of their consumer by a background thread."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from dpjax.data.dataset import Dataset

__all__ = ["Prefetcher", "chunks", "prefetch"]

T = TypeVar("T")
_POLL = 0.1  # seconds between looks at the stop flag while the queue is full


class _Item(NamedTuple):
    value: Any
    error: BaseException | None
    last: bool


class Prefetcher(Generic[T]):
    """An iterator whose items another thread makes ahead; use it in a `with`, or close it.

    Guarantees:
      Items come in order. At most `size` items wait (one more is being made). An exception of the
      iterable reaches the consumer unchanged, after the items before it, with a note of which item
      failed. After `close` the thread has ended.
    """

    def __init__(self, iterable: Iterable[T], size: int = 2) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be >= 1.")
        self._queue: queue.Queue[_Item] = queue.Queue(size)
        self._stop = threading.Event()
        self._waited = 0.0
        self._first: float | None = None
        self._end: float | None = None
        self._done = False
        # The thread must not hold `self`, or a forgotten prefetcher would live for ever.
        self._thread = threading.Thread(
            target=_produce, args=(iterable, self._queue, self._stop), daemon=True,
            name="dpjax-prefetch",
        )  # fmt: skip
        self._thread.start()
        weakref.finalize(self, self._stop.set)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._done:
            raise StopIteration
        start = time.perf_counter()
        item = self._queue.get()
        now = time.perf_counter()
        if self._first is None:
            self._first = now  # the wait for the first item is start-up, not idleness
        else:
            self._waited += now - start
        if item.last:
            self._end = now
            self.close()
            if item.error is not None:
                raise item.error
            raise StopIteration
        return item.value

    @property
    def idle_fraction(self) -> float:
        """Share of the consumer's time since its first item that it spent waiting for the next."""
        if self._first is None:
            return 0.0
        total = (self._end or time.perf_counter()) - self._first
        return min(self._waited / total, 1.0) if total > 0 else 0.0

    def close(self) -> None:
        """Stops the thread and drops what it has made; may be called twice."""
        self._done = True
        self._end = self._end or time.perf_counter()
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def prefetch(iterable: Iterable[T], size: int = 2) -> Prefetcher[T]:
    """Makes the items of `iterable` ahead in a background thread.

    Args:
      iterable: may be infinite; it is advanced in the other thread only.
      size: how many finished items may wait, >= 1.

    Returns:
      An iterator with `idle_fraction` and `close`, also a context manager.

    Raises:
      ValueError: if size < 1.
    """
    return Prefetcher(iterable, size)


def chunks(
    dataset: Dataset, index_arrays: Iterable[np.ndarray], *, ahead: int = 2
) -> Prefetcher[dict[str, np.ndarray]]:
    """Reads a stream of physical chunks ahead of the step that needs them.

    Args:
      dataset: to read from.
      index_arrays: integers of any shape, e.g. [chunk] or [chunks, chunk], -1 is padding; all the
        steps of a run, in order. May be infinite.
      ahead: how many batches may wait.

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


def _produce(iterable: Iterable[Any], items: queue.Queue[_Item], stop: threading.Event) -> None:
    made = 0
    try:
        for value in iterable:
            if not _put(items, _Item(value, None, False), stop):
                return
            made += 1
    except BaseException as error:
        error.add_note(f"while item {made} was being made ahead")
        _put(items, _Item(None, error, True), stop)
        return
    _put(items, _Item(None, None, True), stop)


def _put(items: queue.Queue[_Item], item: _Item, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            items.put(item, timeout=_POLL)
        except queue.Full:
            continue
        return True
    return False
