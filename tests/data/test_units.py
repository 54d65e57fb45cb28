"""Units: whole people are sampled, split and left out; a step reads a few records of each."""

import numpy as np
import pytest

from dpjax import data

CLASSES = [str(c) for c in range(3)]


def records_of(counts, *, drop=(), order_seed=0):
    """Records of `person i`, each with pixels of its own that no other person has."""
    units = np.repeat(np.arange(len(counts)), counts)
    pixels = np.zeros((len(units), 1, 1, 3), np.uint8)
    pixels[:, 0, 0, 0] = units
    within = np.concatenate([np.arange(count) for count in counts])
    pixels[:, 0, 0, 1], pixels[:, 0, 0, 2] = within % 256, within // 256
    keep = np.flatnonzero(~np.isin(units, drop))
    # Left-out records leave the others in their order.
    keep = keep[np.argsort(np.random.RandomState(order_seed).permutation(len(units))[keep])]
    return data.from_arrays(
        "people", pixels[keep], units[keep] % 3, class_names=CLASSES,
        units=np.array([f"person {u}" for u in units[keep]]),
    )  # fmt: skip


def contents(units, step):
    """What a step reads, by unit."""
    batch = units.batch(np.arange(len(units)), seed=3, step=step)
    return {
        int(identity): (x[there].tolist(), y[there].tolist())
        for identity, x, y, there in zip(
            batch["identity"], batch["input"], batch["label"], batch["record"]
        )
    }


def test_a_unit_is_represented_by_its_own_records_and_never_by_more_than_the_limit():
    counts = [1, 2, 7, 10_000]
    units = data.Units(records_of(counts), 4)
    batch = units.batch(np.array([0, 1, 2, 3, -1]), seed=0, step=0)
    assert batch["input"].shape == (5, 4, 1, 1, 3)
    assert sorted(batch["record"].sum(1).tolist()) == [0, 1, 2, 4, 4]
    for x, there in zip(batch["input"], batch["record"]):
        rows = x[there].reshape(-1, 3)
        assert len(np.unique(rows, axis=0)) == len(rows), "no record twice"
        assert len(np.unique(rows[:, 0])) <= 1, "one person only"


def test_every_record_of_a_unit_is_chosen_equally_often():
    units = data.Units(records_of([6]), 2)
    hits = np.zeros(6)
    for step in range(3_000):
        rows = units.rows(np.array([0]), seed=1, step=step)[0]
        hits[units.records.get(rows)["input"][:, 0, 0, 1]] += 1
    expected = 3_000 * 2 / 6
    assert (np.abs(hits - expected) < 5 * np.sqrt(expected * 2 / 3)).all(), hits


def test_a_left_out_unit_changes_nothing_about_any_other():
    counts = [3, 9, 1, 40, 8]
    whole = data.Units(records_of(counts), 4)
    for out in range(len(counts)):
        rest = data.Units(records_of(counts, drop=[out]), 4)
        assert len(rest) == len(whole) - 1
        for step in range(5):
            before, after = contents(whole, step), contents(rest, step)
            assert after.items() <= before.items(), f"without person {out}"


def test_the_choice_changes_from_step_to_step_and_with_the_seed():
    units = data.Units(records_of([50, 50]), 3)
    first = units.rows(np.arange(2), seed=0, step=0)
    assert (first == units.rows(np.arange(2), seed=0, step=0)).all()
    assert (first != units.rows(np.arange(2), seed=0, step=1)).any()
    assert (first != units.rows(np.arange(2), seed=1, step=0)).any()


@pytest.mark.parametrize("split", [data.holdout, data.random_share])
def test_a_split_never_divides_a_unit(split):
    units = data.Units(records_of([4] * 60), 2)
    rest, share = split(units, 0.3, seed=2)
    names = [set(part.records.units) for part in (rest, share)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 60
    assert all(np.all(part.counts() == 4) for part in (rest, share))
    # Where a unit goes is its own affair.
    fewer = split(data.Units(records_of([4] * 60, drop=[7]), 2), 0.3, seed=2)
    assert [set(p.records.units) | {"person 7"} for p in fewer] == [n | {"person 7"} for n in names]


def test_a_subset_takes_whole_units():
    units = data.Units(records_of([4] * 20), 2)
    half = data.subset(units, 0.5, seed=0)
    assert len(half) == 10
    assert np.all(half.counts() == 4)
    with pytest.raises(ValueError, match="divide units"):
        data.subset(units, 3, seed=0)


def test_the_digest_follows_the_records_and_whose_they_are():
    one = records_of([3, 3])
    digests = {
        data.Units(one, 2).digest,
        data.Units(one, 3).digest,
        data.Units(records_of([3, 4]), 2).digest,
        data.Units(records_of([3, 3], order_seed=1), 2).digest,
    }
    assert len(digests) == 4
    assert data.Units(one, 2).digest in digests


def test_mistakes_are_named():
    plain = data.from_arrays("x", np.zeros((2, 1, 1, 1), np.uint8), [0, 1], class_names=CLASSES)
    with pytest.raises(ValueError, match="does not say whose"):
        data.Units(plain, 1)
    with pytest.raises(ValueError, match="unit_records=0"):
        data.Units(records_of([2]), 0)
    with pytest.raises(ValueError, match="units of shape"):
        data.from_arrays("x", np.zeros((2, 1, 1, 1), np.uint8), [0, 1], class_names=CLASSES,
                         units=np.array(["a"]))  # fmt: skip


def test_the_units_of_a_table_come_with_its_records(tmp_path):
    people = ("ann", "bo", "cy")
    rows = [(f"note {i} of {who}", "ab"[i % 2], who) for who in people for i in range(4)]
    lines = "\n".join(f"{text},{label},{who}" for text, label, who in rows)
    (tmp_path / "notes.csv").write_text(f"text,label,unit\n{lines}\n")
    data.prepare_archive("notes", source=tmp_path / "notes.csv", data_dir=tmp_path / "data")

    def tokenize(texts):
        return np.array([[len(text), sum(text.encode())] for text in texts], np.int32)

    for _ in range(2):  # read, then from the index
        records = data.load_text(
            "notes", split="train", data_dir=tmp_path / "data", tokenize=tokenize, unit="unit"
        )
        whose = {tuple(tokenize([text])[0].tolist()): who for text, _, who in rows}
        tokens = records.get(np.arange(len(records)))["input"]
        assert [whose[tuple(row.tolist())] for row in tokens] == records.units.tolist()
        assert len(data.Units(records, 2)) == 3
    with pytest.raises(ValueError, match=r"unit='units' must be one of .*Did you mean 'unit'"):
        data.load_text("notes", data_dir=tmp_path / "data", tokenize=tokenize, unit="units")
