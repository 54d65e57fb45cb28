"""Dataset: padding, bounds, labels, digest."""

import numpy as np
import pytest

from dpjax import data


def make(n=6, labels=None, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (n, 4, 5, 3)).astype(np.uint8)
    labels = np.arange(n) % 3 if labels is None else labels
    return pixels, data.from_arrays("toy", pixels, labels, class_names=("a", "b", "c"))


def test_get_returns_rows_and_zero_padding():
    pixels, dataset = make()
    batch = dataset.get(np.array([4, -1, 0, 4]))
    np.testing.assert_array_equal(batch["input"][[0, 2, 3]], pixels[[4, 0, 4]])
    np.testing.assert_array_equal(batch["input"][1], 0)
    np.testing.assert_array_equal(batch["label"], [1, 0, 0, 1])
    assert batch["input"].dtype == np.uint8
    assert batch["label"].dtype == np.int32


def test_get_keeps_the_shape_of_indices_and_takes_only_padding():
    pixels, dataset = make()
    batch = dataset.get(np.array([[0, 1, 2], [3, -1, -1]]))
    assert batch["input"].shape == (2, 3, 4, 5, 3)
    np.testing.assert_array_equal(batch["input"][1, 0], pixels[3])
    assert dataset.get(np.full(3, -1))["input"].sum() == 0
    assert dataset.get(np.zeros(0, np.int32))["input"].shape == (0, 4, 5, 3)


@pytest.mark.parametrize("index", [-2, 6])
def test_get_refuses_an_index_out_of_range(index):
    with pytest.raises(ValueError, match=rf"index={index} must be in \[-1, 6\)"):
        make()[1].get(np.array([0, index]))


def test_get_refuses_indices_that_are_not_integers():
    with pytest.raises(ValueError, match="float64 must be integers"):
        make()[1].get(np.array([0.0]))


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_labels_out_of_range_name_example_and_value(label):
    labels = np.array([0, 1, 2, label, 1, 2])
    with pytest.raises(ValueError, match=rf"label={label} of example 3 .* in \[0, 3\)"):
        make(labels=labels)


def test_bad_arrays():
    pixels, _ = make()
    with pytest.raises(ValueError, match="float64"):
        data.from_arrays("toy", pixels.astype(float), np.zeros(6, int), class_names="a")
    with pytest.raises(ValueError, match="6 inputs and 5 labels"):
        data.from_arrays("toy", pixels, np.zeros(5, int), class_names="a")
    with pytest.raises(ValueError, match="no examples"):
        data.from_arrays("toy", pixels[:0], np.zeros(0, int), class_names="a")


@pytest.mark.parametrize("label", [0.9, np.nan, True])
def test_labels_that_are_no_integers_are_not_cut_to_some(label):
    with pytest.raises(ValueError, match=r"labels of dtype (float64|bool) must be integers"):
        make(labels=np.full(6, label))


def test_labels_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        make()[1].labels[0] = 2


def test_select_composes_and_reports_rows():
    pixels, dataset = make()
    part = dataset.select(np.array([5, 2, 3])).select(np.array([2, 0]))
    np.testing.assert_array_equal(part.rows, [3, 5])
    np.testing.assert_array_equal(part.get(np.array([0, 1]))["input"], pixels[[3, 5]])
    assert len(part) == part.num_examples == 2
    assert part.num_classes == 3


def test_select_refuses_repeats_and_out_of_range():
    _, dataset = make()
    with pytest.raises(ValueError, match="repeated"):
        dataset.select(np.array([1, 1]))
    with pytest.raises(ValueError, match="index=-1"):
        dataset.select(np.array([0, -1]))


def test_digest_depends_on_pixels_labels_and_order_only():
    pixels, dataset = make()
    assert dataset.digest == make()[1].digest
    assert dataset.digest != make(seed=1)[1].digest
    assert dataset.digest != make(labels=np.zeros(6, int))[1].digest
    assert dataset.digest != dataset.select(np.arange(6)[::-1]).digest
    assert dataset.select(np.arange(6)).digest == dataset.digest
    renamed = data.from_arrays("x", pixels[:3], np.arange(3), class_names=("a", "b", "c"))
    assert renamed.digest == dataset.select(np.arange(3)).digest
