"""Piecewise constant values and the stages they cut a run into."""

import itertools

import pytest

from dpjax import dp
from dpjax.build import schedules


def stages(batch_sizes=((0.0, 50),), bounds=((0.0, 1.0),), **changes):
    fields = {"num_examples": 1000, "epochs": 7.3, **changes}
    return schedules.stages(batch_sizes=batch_sizes, bounds=bounds, **fields)


def test_epochs_of_random_allocation_have_whole_steps():
    plain, whole = (stages(((0.0, 150),), epochs=2, whole_epochs=w)[0].steps for w in (False, True))
    assert (plain, whole) == (13, 14)  # 2 * 1000 / 150, and 2 * 7


def test_without_a_change_there_is_one_stage_of_all_steps():
    (stage,) = stages()
    assert stage == (0.0, dp.num_steps(1000, 50, 7.3), 50, 1.0)
    assert stages(epochs=0.001)[0].steps == 1  # at least one, as without a schedule


@pytest.mark.parametrize("cuts", [[0.5], [0.1, 0.2, 0.9], [0.333, 1.0]])
def test_cuts_do_not_change_the_number_of_steps(cuts):
    assert sum(stage.steps for stage in stages(cuts=cuts)) == dp.num_steps(1000, 50, 7.3)


def test_each_share_of_the_epochs_has_the_steps_of_its_batch_size():
    made = stages(((0.0, 20), (0.25, 100)), ((0.0, 0.1), (0.95, 20.0)), epochs=10)
    assert [(s.batch_size, s.bound) for s in made] == [(20, 0.1), (100, 0.1), (100, 20.0)]
    assert [s.steps for s in made] == [125, 70, 5]
    assert sum(s.steps * s.batch_size for s in made) == 10 * 1000


def test_rounding_does_not_add_up():
    sizes = tuple((i / 7, 30 + i) for i in range(7))
    made = stages(sizes, epochs=3)
    read = sum(s.steps * s.batch_size for s in made)
    assert abs(read - 3000) < 2 * max(s.batch_size for s in made)
    assert all(a.begin < b.begin for a, b in itertools.pairwise(made))


def test_a_value_that_no_step_sees_is_an_error():
    with pytest.raises(ValueError, match=r"^dp\.bound_schedule=.* 20\.0 lasts less than one step"):
        stages(bounds=((0.0, 0.1), (0.999, 20.0)), epochs=1)


@pytest.mark.parametrize(
    "wrong",
    [
        5, ((0.0,),), ((0.1, 1.0),), ((0.0, 1.0), (0.0, 2.0)), ((0.0, 1.0), (1.0, 2.0)),
        ((0.0, -1.0),), ((0.0, "x"),), ((0.0, True),), ((0.0, 1.0), (float("nan"), 2.0)),
        ((0.0, float("inf")),),
    ],
)  # fmt: skip
def test_bad_schedules_name_the_field(wrong):
    with pytest.raises(ValueError, match=r"^dp\.bound_schedule="):
        schedules.values("dp.bound_schedule", wrong)
