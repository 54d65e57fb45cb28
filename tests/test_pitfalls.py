"""The known ways to lose privacy silently, each with the tests that own it and those that show that
the owners can fail. Each row was an issue in another library; a row without both is a failure."""

import ast
import functools
import json
from pathlib import Path

import jax
import pytest
import test_broken
import test_seeds
import test_train

from dpjax import guide
from dpjax.dp import seeds

TESTS = Path(__file__).parent
CAUGHT = "test_broken.py::test_broken_trainers_are_caught"

# pitfall -> (owning tests, tests that show that they can fail), each "file::test" or
# "file::test[case]"
PITFALLS = {
    "noise per device, then summed or averaged": (
        [
            "test_step.py::test_noise_is_drawn_once_in_the_global_view",
            "test_noise.py::test_values_do_not_depend_on_the_number_of_devices",
            "test_train.py::test_every_step_draws_its_own_batch_and_noise",
            "test_multiprocess.py::test_two_processes_give_the_parameters_of_one",
            "test_broken.py::test_the_product_passes_every_check",
        ],
        [
            f"{CAUGHT}[noise drawn on every device]",
            "test_numerics.py::test_the_same_draw_on_every_device_is_seen",
        ],
    ),
    "same key over leaves, steps, resume, or for dropout and noise": (
        [
            "test_noise.py::test_leaves_and_steps_are_uncorrelated",
            "test_numerics.py::test_steps_leaves_and_neighbors_are_independent",
            "test_train.py::test_cut_run_resumes_bit_for_bit",
            "test_preemption.py::test_phases_resume_bit_for_bit_and_share_no_draw",
            "test_seeds.py::test_streams_differ",
            "test_attack.py::test_no_seed_of_the_run_is_used_again",
        ],
        [
            f"{CAUGHT}[one key for all steps]",
            f"{CAUGHT}[one key for all leaves]",
            "test_pitfalls.py::test_the_key_reuse_check_is_on",
        ],
    ),
    "public or weak seed": (
        [
            "test_train.py::test_release_mode_takes_os_entropy_and_hides_it",
            "test_ledger.py::test_statement_has_what_others_rely_on",
            "test_seeds.py::test_entropy",
        ],
        ["test_pitfalls.py::test_a_constant_seed_is_seen"],
    ),
    "noise in bfloat16": (
        [
            "test_noise.py::test_noise_is_float32_for_bfloat16_parameters",
            "test_clipped_sum.py::test_sums_are_float32_in_a_bfloat16_model",
        ],
        ["test_numerics.py::test_drift_would_show_in_half_precision"],
    ),
    "a sum that is rounded to few bits": (
        ["test_bookkeeping_precision.py::test_many_examples_move_no_sum_by_more_than_the_bound"],
        ["test_numerics.py::test_drift_would_show_in_half_precision"],
    ),
    "a norm that is measured smaller than it is": (
        [
            "test_products.py::test_cancelling_gradients_are_not_measured_too_small",
            "test_products.py::test_underflowing_gradients_are_not_measured_too_small",
            "test_products.py::test_products_are_those_of_exact_arithmetic",
        ],
        [
            "test_products.py::test_a_norm_without_its_margin_is_seen",
            "test_bookkeeping.py::test_battery_catches_a_wrong_rule",
        ],
    ),
    "noise whose tails end early": (
        [
            "test_noise.py::test_the_range_is_nine_standard_deviations_and_symmetric",
            "test_noise.py::test_numbers_are_the_quantiles_of_their_64_bits",
            "test_noise.py::test_every_draw_for_privacy_has_these_tails",
        ],
        ["test_noise.py::test_a_short_range_is_seen"],
    ),
    "low bits of floating-point noise and sums": (
        [
            "test_noise_secure.py::test_the_distance_from_the_rounded_gaussian_is_below_the_bound",
            "test_noise_secure.py::test_the_sum_is_exact_in_any_order_and_chunks",
            "test_noise_secure.py::test_neighboring_sums_differ_by_at_most_the_limit",
            "test_noise_secure.py::test_a_number_is_the_draw_of_its_85_bits",
        ],
        [
            "test_noise_secure.py::test_a_sum_for_less_noise_gives_nothing_but_nan",
            "test_noise_secure.py::test_a_delta_that_cannot_pay_is_refused",
        ],
    ),
    "an example that changes another one's augmentation, or the part it is in": (
        [
            "test_train.py::test_removing_an_example_moves_an_augmented_sum_by_at_most_the_bound",
            "test_subsets.py::test_where_an_example_goes_depends_on_itself_alone",
        ],
        [
            "test_train.py::test_augmentation_by_position_is_seen",
            "test_subsets.py::test_a_choice_that_depends_on_others_is_seen",
        ],
    ),
    "division by realized, padded or private size": (
        [
            "test_noise.py::test_the_division_is_by_the_expected_size",
            "test_broken.py::test_the_product_passes_every_check",
        ],
        [
            "test_noise.py::test_division_by_the_realized_or_padded_size_is_seen",
            f"{CAUGHT}[division by the realized size]",
        ],
    ),
    "accumulation counted as one draw, shuffling as Poisson, truncation uncounted, rate rounded": (
        [
            "test_mechanism.py::test_accounted_rate_is_configured_rate_is_empirical_rate",
            "test_mechanism.py::test_truncated_event_knows_its_truncation",
            "test_mechanism.py::test_nothing_shuffled_can_be_expressed",
            "test_sampling.py::test_poisson_law",
            "test_multiprocess.py::test_every_topology_uses_the_examples_that_were_drawn",
        ],
        [
            "test_sampling.py::test_the_law_check_sees_a_shuffled_epoch",
            f"{CAUGHT}[shuffling accounted as Poisson]",
            f"{CAUGHT}[truncation unaccounted]",
            f"{CAUGHT}[an example used twice]",
        ],
    ),
    "more updates executed than calibrated": (
        [
            "test_ledger.py::test_no_step_past_the_budget",
            "test_train.py::test_training_refuses_to_pass_the_budget",
            "test_preemption.py::test_what_a_killed_process_reported_is_never_taken_back",
        ],
        [f"{CAUGHT}[budget overrun]"],
    ),
    "empty batch skipped": (
        [
            "test_noise.py::test_an_empty_batch_is_a_step_of_pure_noise",
            "test_fuzz.py::test_tiny_data_sets_train_to_the_end",
        ],
        [f"{CAUGHT}[empty batches skipped]"],
    ),
    "NaN example poisons the sum": (
        [
            "test_clipped_sum.py::test_a_poisoned_example_leaves_the_others_bit_for_bit",
            "test_bookkeeping_precision.py::test_poisoned_example_leaves_the_others_unchanged",
            "test_fuzz.py::test_chunks_masks_and_broken_pixels_add_up",
        ],
        ["test_clipped_sum.py::test_masking_by_multiplication_is_seen"],
    ),
    "frozen layers eat the clipping budget": (
        [
            "test_clipped_sum.py::test_frozen_leaves_do_not_enter_the_norm",
            "test_bookkeeping_precision.py::test_frozen_parameters_cost_nothing",
        ],
        [f"{CAUGHT}[frozen layers in the norm]"],
    ),
    "BatchNorm under vmap": (
        [
            "test_validate.py::test_batch_norm_in_training_mode_is_refused_behind_a_zero_head",
            "test_validate.py::test_any_coupling_is_refused",
        ],
        ["test_validate.py::test_batch_norm_in_inference_mode_passes"],
    ),
    "two uses of randomness that share a key, or a public seed": (
        [
            "test_streams.py::test_no_two_uses_of_a_run_share_a_key",
            "test_streams.py::test_every_audited_run_and_its_coins_have_seeds_of_their_own",
            "test_streams.py::test_the_runs_of_a_charged_search_come_from_the_operating_system",
        ],
        [
            "test_streams.py::test_an_edit_that_joins_two_streams_is_seen",
            "test_streams.py::test_points_from_the_flag_would_be_seen",
        ],
    ),
    "the same noise on another sum, after other data, weights, fields or processes": (
        [
            "test_preemption.py::test_other_data_under_the_same_name_are_refused_before_any_checkpoint",
            "test_preemption.py::test_other_weights_under_the_same_name_are_refused",
            "test_preemption.py::test_every_field_is_in_the_identity_or_may_change_for_a_reason",
            "test_preemption.py::test_a_second_process_is_refused_before_it_writes",
        ],
        ["test_workdir.py::test_a_directory_keeps_its_run"],
    ),
    "a statement of fewer steps than drew noise, or of other weights": (
        [
            "test_ledger.py::test_a_ledger_that_nobody_charged_has_no_statement",
            "test_export.py::test_private_weights_without_a_statement_are_not_exported",
            "test_trials.py::test_a_draw_pays_for_the_search_it_was_made_for",
        ],
        [
            "test_ledger.py::test_a_statement_covers_every_draw_of_noise",
            "test_preemption.py::test_a_state_of_other_steps_than_were_charged_ends_without_results",
        ],
    ),
    "a private number, seed or time in a file that is published": (
        [
            "test_train.py::test_the_threat_model_lists_every_file_and_no_other_may_be_read",
            "test_train.py::test_checkpoints_hold_nothing_about_seed_or_data",
            "test_train.py::test_evaluations_on_private_data_are_named_so",
            "test_export.py::test_the_result_of_an_audit_stays_behind",
        ],
        ["test_workdir.py::test_what_may_not_be_published_is_readable_by_its_owner_only"],
    ),
    "search, early stopping, logged losses uncharged": (
        [
            "test_train.py::test_private_facts_are_named_so",
            "test_train.py::test_evaluating_on_the_training_split_is_not_private_and_said",
            "test_ledger.py::test_a_run_that_ends_early_claims_its_plan",
            "test_repeat_and_select.py::test_no_scores_of_any_discrete_mechanism_cost_more",
            "test_trials.py::test_statements_say_what_was_tried_and_whether_it_is_charged",
            "test_trials.py::test_a_charged_search_keeps_the_budget",
        ],
        ["test_pitfalls.py::test_a_private_fact_without_its_label_is_seen"],
    ),
}


# The classes that others list: of the audit of twelve libraries by arXiv 2602.17454 (with the glue
# that its authors name), and of jax_privacy's page on pitfalls. Each is owned by rows of PITFALLS
# or by tests; the guide (evidence.md) has this table.
CLASSES = {
    "control flow or a loop that depends on the data": [
        "empty batch skipped",
        "test_fuzz.py::test_tiny_data_sets_train_to_the_end",
        "test_ledger.py::test_a_run_that_ends_early_claims_its_plan",
    ],
    "a sensitivity that is declared smaller than it is": [
        "a norm that is measured smaller than it is",
        "test_train.py::test_removing_an_example_moves_an_augmented_sum_by_at_most_the_bound",
        "test_engine_bound.py",
    ],
    "a noise scale or a divisor that depends on the data": [
        "division by realized, padded or private size"
    ],
    "an accountant that reports less than was spent": [
        "more updates executed than calibrated",
        "a statement of fewer steps than drew noise, or of other weights",
        "test_accounting.py",
    ],
    "accounting that does not match the batches": [
        "accumulation counted as one draw, shuffling as Poisson, truncation uncounted, rate rounded"
    ],
    "public and private facts mixed; auxiliary outputs": [
        "a private number, seed or time in a file that is published",
        "search, early stopping, logged losses uncharged",
    ],
    "a neighboring relation that is not said": [
        "test_ledger.py::test_markdown_says_the_same",
        "test_ledger.py::test_phases_of_one_relation_only",
    ],
    "empty batches and gradients that are not finite": [
        "empty batch skipped", "NaN example poisons the sum",
    ],
    "gradient accumulation that clips or draws noise for each part": [
        "noise per device, then summed or averaged",
        "test_fuzz.py::test_chunks_masks_and_broken_pixels_add_up",
    ],
    "operations across examples": [
        "BatchNorm under vmap",
        "an example that changes another one's augmentation, or the part it is in",
    ],
    "randomness that is weak or used twice": [
        "public or weak seed",
        "same key over leaves, steps, resume, or for dropout and noise",
        "two uses of randomness that share a key, or a public seed",
        "the same noise on another sum, after other data, weights, fields or processes",
    ],
    "finite precision": [
        "noise in bfloat16", "a sum that is rounded to few bits", "noise whose tails end early",
        "low bits of floating-point noise and sums",
    ],
}  # fmt: skip


@functools.cache
def names_in(file):
    """Functions of a test file in whichever folder; None if there is no such file."""
    path = next(TESTS.rglob(file), None)
    if path is None:
        return None
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def missing(name):
    """What of "file::test[case]" does not exist; None if all of it does."""
    file, _, test = name.partition("::")
    test, _, case = test.partition("[")
    if names_in(file) is None:
        return f"no file {file}"
    if test not in names_in(file):
        return f"no test {test} in {file}"
    if case and case.removesuffix("]") not in test_broken.BROKEN:
        return f"no case {case}"
    return None


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_every_pitfall_is_owned_and_its_owners_can_fail(pitfall):
    owners, companions = PITFALLS[pitfall]
    assert owners
    assert companions
    assert [m for m in map(missing, owners + companions) if m] == []


@pytest.mark.parametrize("kind", CLASSES)
def test_every_class_that_others_list_is_owned(kind):
    for owner in CLASSES[kind]:
        if owner.endswith(".py"):
            assert names_in(owner), owner
        else:
            assert owner in PITFALLS or missing(owner) is None, owner


def test_the_guide_has_the_table_of_these_classes():
    text = (Path(guide.__file__).parent / "evidence.md").read_text()
    lines = ["| violation | guarded by |", "|---|---|"]
    lines += [
        f"| {kind} | " + "; ".join(f"`{o}`" if ".py" in o else o for o in owners) + " |"
        for kind, owners in CLASSES.items()
    ]
    assert "\n".join(lines) in text


def test_a_missing_owner_is_seen():
    assert missing("test_noise.py::test_of_nothing") == "no test test_of_nothing in test_noise.py"
    assert missing("test_nothing.py::test_x") == "no file test_nothing.py"
    assert missing(f"{CAUGHT}[no such mistake]") == "no case no such mistake]"


def test_every_broken_trainer_shows_a_pitfall_or_a_law():
    shown = {c for _, companions in PITFALLS.values() for c in companions}
    rest = {name for name in test_broken.BROKEN if f"{CAUGHT}[{name}]" not in shown}
    assert rest == {  # mistakes of the mechanism itself, which no row above is about
        "no noise", "half the noise", "1/sqrt(2) of the noise", "no clipping",
        "clipping after the mean",
    }  # fmt: skip


def pitfall_table() -> str:
    """Returns the table as Markdown."""
    lines = ["| pitfall | owned by | shown to fail by |", "|---|---|---|"]
    for pitfall, columns in PITFALLS.items():
        cells = ["<br>".join(f"`{name}`" for name in names) for names in columns]
        lines.append(f"| {pitfall} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- Companions that have no better home ---------------------------------------------------------


def test_the_key_reuse_check_is_on():
    key = jax.random.key(0)
    jax.random.normal(key)
    with pytest.raises(jax.errors.KeyReuseError):
        jax.random.normal(key)


def test_a_constant_seed_is_seen(monkeypatch):
    monkeypatch.setattr(seeds.secrets, "randbits", lambda bits: 7)
    with pytest.raises(AssertionError):
        test_seeds.test_entropy()


def test_a_private_fact_without_its_label_is_seen(tmp_path):
    row = {"step": 1, "nonprivate/loss": 0.5, "epsilon": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    test_train.test_private_facts_are_named_so((None, tmp_path, None))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**row, "loss": 0.5}) + "\n")
    with pytest.raises(AssertionError):
        test_train.test_private_facts_are_named_so((None, tmp_path, None))
