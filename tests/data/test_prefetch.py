"""Background loading: order, errors, shutdown, idle time."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

from dpjax import data


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("dpjax-prefetch")]


def ended():
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not threads()


def test_items_arrive_in_order_and_the_thread_ends():
    assert list(data.Prefetcher(iter(range(50)), 3)) == list(range(50))
    assert ended()


def test_it_runs_ahead_but_not_further_than_asked():
    made = []

    def count():
        for item in range(100):
            made.append(item)
            yield item

    with data.Prefetcher(count(), 3) as items:
        assert next(items) == 0
        time.sleep(0.3)
        assert 3 <= len(made) <= 5
    assert ended()


def test_an_exception_reaches_the_consumer_after_the_items_before_it():
    def broken():
        yield 1
        yield 2
        raise RuntimeError("disk gone")

    items = data.Prefetcher(broken())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(RuntimeError, match="disk gone") as caught:
        next(items)
    assert "item 2" in caught.value.__notes__[0]
    with pytest.raises(StopIteration):
        next(items)
    assert ended()


def test_closing_early_ends_the_thread_even_with_a_full_queue():
    def endless():
        while True:
            yield 0

    items = data.Prefetcher(endless(), 1)
    next(items)
    items.close()
    items.close()
    assert not threads()
    with pytest.raises(StopIteration):
        next(items)


def test_a_forgotten_prefetcher_is_collected():
    def endless():
        while True:
            yield 0

    items = data.Prefetcher(endless(), 1)
    gone = weakref.ref(items)
    del items
    gc.collect()
    assert gone() is None
    assert ended()


def test_idle_fraction_tells_a_slow_producer_from_a_slow_consumer():
    def slow():
        for item in range(6):
            time.sleep(0.05)
            yield item

    starved = data.Prefetcher(slow())
    assert starved.idle_fraction == 0
    list(starved)
    busy = data.Prefetcher(range(6))
    for _ in busy:
        time.sleep(0.05)
    assert starved.idle_fraction > 0.8
    assert busy.idle_fraction < 0.2


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="size=0"):
        data.Prefetcher([], 0)


def toy():
    pixels = np.random.RandomState(0).randint(0, 256, (9, 2, 2, 1)).astype(np.uint8)
    return pixels, data.from_arrays("toy", pixels, np.arange(9) % 2, class_names="ab")


def test_chunks_are_what_get_gives_with_a_mask():
    pixels, dataset = toy()
    steps = [
        np.array([[0, 3], [8, -1]]),
        np.array([[-1, -1], [-1, -1]]),
        np.array([[1, 1], [2, 7]]),
    ]
    with data.read_ahead(dataset, iter(steps)) as batches:
        for indices, batch in zip(steps, batches, strict=True):
            np.testing.assert_array_equal(batch["mask"], indices >= 0)
            assert batch["input"].shape == (2, 2, 2, 2, 1)
            real = indices >= 0
            np.testing.assert_array_equal(batch["input"][real], pixels[indices[real]])
            assert not batch["input"][~real].any()
            assert not batch["label"][~real].any()


def test_a_bad_index_is_named():
    with pytest.raises(ValueError, match="index=9") as caught:
        list(data.read_ahead(toy()[1], [np.array([0]), np.array([9])]))
    assert "item 1" in caught.value.__notes__[0]
