"""The planner: its table, its choice and its command line."""

import json
import math
import subprocess
import sys

import matplotlib.image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpjax.build import planner
from dpjax.build.planner import plan
from dpjax.commands import plan as command
from dpjax.dp import accounting

QUESTION = dict(num_examples=50_000, epochs=8, epsilon=1.0, delta=1e-5)
ARGV = ["plan", "--num_examples=50000", "--epochs=8", "--epsilon=1", "--delta=1e-5"]
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict(dict(epochs=8.0, data=dict(name="x"), dp=dict(epsilon=1.0, delta=1e-5)))
    config.lock()
    return config
"""


@pytest.fixture(scope="module")
def standard():
    return plan(**QUESTION)


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*argv):
        monkeypatch.setattr(sys, "argv", ["plan", *argv])
        code = command.main()
        return code, *capsys.readouterr()

    return call


# --- The table -----------------------------------------------------------------------------------


def test_every_column_is_what_it_says(standard):
    assert [row.batch_size for row in standard.rows] == [*(256 << k for k in range(8)), 50_000]
    for row in standard.rows:
        assert row.sampling_prob == row.batch_size / 50_000
        assert row.steps == round(8 * 50_000 / row.batch_size)
        sigma = row.noise_multiplier
        assert row.cumulative_noise == pytest.approx(sigma * math.sqrt(row.steps))
        assert row.noise_over_prob == pytest.approx(sigma / row.sampling_prob)
        assert row.step_noise == pytest.approx(sigma / row.batch_size)
        event = accounting.poisson(sigma, row.sampling_prob, row.steps)
        assert 0.999 < accounting.epsilon(event, 1e-5) <= 1.0002
        assert row.enough_steps == (row.steps >= planner.MIN_STEPS)


def test_the_table_is_the_papers(standard):
    # The paper's table has q = 1/ceil(N/B), T = 8 ceil(N/B); with q = B/N, T = round(EN/B) the full
    # batch is the same and small ones nearly.
    printed = {256: 1.05, 1024: 1.74, 4096: 3.16, 50_000: 10.55}
    for row in standard.rows:
        if row.batch_size in printed:
            assert row.noise_multiplier == pytest.approx(printed[row.batch_size], rel=0.04)
    assert f"{standard.rows[-1].noise_multiplier:.2f}" == "10.55"
    assert f"{standard.rows[-1].cumulative_noise:.1f}" in ("29.8", "29.9")


def test_noise_falls_and_cumulative_noise_flattens_as_batches_grow(standard):
    sigmas = [row.noise_multiplier for row in standard.rows]
    cumulative = [row.cumulative_noise for row in standard.rows]
    assert sigmas == sorted(sigmas)
    assert cumulative == sorted(cumulative, reverse=True)
    assert [row.noise_over_prob for row in standard.rows] == sorted(
        (row.noise_over_prob for row in standard.rows), reverse=True
    )


# --- The choice ----------------------------------------------------------------------------------


def test_the_choice_is_the_rule(standard):
    def total(row):
        return math.hypot(row.cumulative_noise, standard.sampling_noise * math.sqrt(8))

    enough = [row for row in standard.rows if row.steps >= standard.min_steps]
    lowest = min(total(row) for row in enough)
    on_plateau = [row for row in enough if total(row) <= 1.05 * lowest]
    assert standard.batch_size == min(row.batch_size for row in on_plateau)
    assert f"B={standard.batch_size} takes" in standard.reason
    assert 1 < len(on_plateau) < len(enough)  # the rule had something to decide
    assert [row.above_plateau for row in standard.rows] == pytest.approx(
        [total(row) / lowest - 1 for row in standard.rows]
    )


def test_tighter_budgets_choose_smaller_batches_and_fewer_epochs_avoid_large_ones():
    def batch(epochs, epsilon):
        return plan(4000, epochs, epsilon, 1e-5, tol=3e-3).batch_size

    tight, loose, short = batch(8, 0.5), batch(8, 8.0), batch(1, 8.0)
    assert tight < loose
    assert short < loose


@settings(max_examples=8, deadline=None)
@given(
    st.integers(50, 1500), st.floats(0.3, 30), st.floats(0.3, 9), st.integers(1, 60),
    st.floats(0, 1),
)  # fmt: skip
def test_any_choice_has_enough_steps_or_the_most(num, epochs, epsilon, min_steps, tolerance):
    rule = dict(min_steps=min_steps, plateau_tolerance=tolerance, tol=3e-2)
    if round(epochs * num / min(256, num)) == 0:
        with pytest.raises(ValueError, match="less than one step"):
            plan(num, epochs, epsilon, 1e-5, **rule)
        return
    made = plan(num, epochs, epsilon, 1e-5, **rule)
    (chosen,) = (row for row in made.rows if row.batch_size == made.batch_size)
    assert chosen.steps >= min_steps or chosen.steps == max(row.steps for row in made.rows)
    assert all(row.steps >= 1 for row in made.rows)
    assert made.reason


def test_the_parameters_of_the_rule(standard):
    loosest = plan(**QUESTION, plateau_tolerance=10.0)
    assert loosest.batch_size == 256
    strictest = plan(**QUESTION, plateau_tolerance=0.0)
    assert strictest.batch_size == 8192
    assert "is the lowest of all" in strictest.reason
    by_sampling = [plan(**QUESTION, sampling_noise=s).batch_size for s in (0.0, 10.0, 1e6)]
    assert by_sampling == sorted(by_sampling, reverse=True)
    assert by_sampling[-1] == 256
    assert plan(**QUESTION, plateau_tolerance=0.0, min_steps=1).batch_size == 50_000
    assert plan(**QUESTION, plateau_tolerance=0.0, min_steps=100).batch_size == 2048


def test_a_data_set_smaller_than_the_smallest_batch():
    made = plan(100, 8, 1.0, 1e-5)
    assert [row.batch_size for row in made.rows] == [100]
    assert made.rows[0].sampling_prob == 1
    assert made.rows[0].steps == 8
    assert made.batch_size == 100
    assert "No candidate takes 40 steps" in made.reason
    assert plan(100, 50, 1.0, 1e-5).reason.startswith("B=100 takes T=50 steps")


@pytest.mark.parametrize(
    "num,sizes", [(256, [256]), (257, [256, 257]), (1, [1]), (512, [256, 512])]
)
def test_candidates_end_at_the_full_batch_once(num, sizes):
    assert list(planner.candidates(num)) == sizes


def test_less_than_one_epoch_leaves_out_batches_of_less_than_a_step():
    made = plan(50_000, 0.25, 1.0, 1e-5, tol=1e-2)
    assert [row.batch_size for row in made.rows] == [256, 512, 1024, 2048, 4096, 8192, 16384]
    assert "Left out, as less than one step: B=32768, 50000" in made.reason
    assert made.rows[-1].steps == 1
    assert made.batch_size <= 512


def test_given_candidates_in_any_order():
    made = plan(**QUESTION, batch_sizes=[20_000, 25_000, 20_000])
    assert [row.batch_size for row in made.rows] == [20_000, 25_000]
    only = plan(**QUESTION, batch_sizes=[50_000])
    assert only.batch_size == 50_000
    assert "No candidate takes 40 steps" in only.reason


def test_suggestions_follow_the_findings():
    tight, loose = (plan(5000, 8, eps, 1e-5, batch_sizes=[5000]) for eps in (0.5, 8.0))
    bounds = [made.suggestions[0] for made in (tight, loose)]
    assert [item.name for item in tight.suggestions] == ["bound", "learning_rate"]
    assert bounds[0].low > bounds[1].low
    assert bounds[0].high > bounds[1].high
    small, large = (
        plan(5000, 8, 1.0, 1e-5, batch_sizes=[b], tol=1e-2).suggestions[1] for b in (256, 4096)
    )
    assert large.low == pytest.approx(4 * small.low, rel=0.1)  # sqrt(B)
    for item in tight.suggestions:
        assert 0 < item.low < item.high
    text = " ".join(reason for item in tight.suggestions for reason in item.reasons)
    for word in ("epsilon", "Difficulty", "Epochs", "Parameter set", "not free", "charge"):
        assert word in text


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(epsilon=0.0), r"epsilon=0.0 must be > 0"),
        (dict(epsilon=math.nan), r"epsilon=nan must be > 0"),
        (dict(delta=2e-5), r"delta=2e-05 must be < 1/num_examples = 2e-05"),
        (dict(delta=0.0), r"delta=0.0 must be in"),
        (dict(num_examples=0), r"num_examples=0 must be"),
        (dict(epochs=0), r"epochs=0 must be > 0"),
        (dict(epochs=math.inf), r"epochs=inf must be > 0 and finite"),
        (dict(epochs=0.001), r"epochs=0.001 is less than one step"),
        (dict(batch_sizes=[50_001]), r"batch_sizes=50001 must be in 1..num_examples=50000"),
        (dict(batch_sizes=[0]), r"batch_sizes=0 must be in 1"),
        (dict(batch_sizes=[]), r"batch_sizes=\[\]"),
        (dict(min_steps=0), r"min_steps=0 must be >= 1"),
        (dict(plateau_tolerance=-0.1), r"plateau_tolerance=-0.1 must be >= 0"),
        (dict(sampling_noise=-1.0), r"sampling_noise=-1.0 must be >= 0"),
        (dict(plateau_tolerance=math.nan), r"plateau_tolerance=nan must be >= 0"),
    ],
)
def test_impossible_questions_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        plan(**{**QUESTION, **change})


# --- The command ---------------------------------------------------------------------------------


def test_json_is_one_object_with_the_promised_keys(run, standard):
    code, out, err = run(*ARGV[1:], "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["batch_size"] == standard.batch_size
    assert made["reason"] == standard.reason
    promised = {"batch_size", "sampling_prob", "steps", "noise_multiplier", "cumulative_noise"}
    assert all(promised <= set(row) for row in made["rows"])
    assert len(made["rows"]) == len(standard.rows)
    assert {item["name"] for item in made["suggestions"]} == {"bound", "learning_rate"}


def test_the_table_is_readable(run, standard):
    code, out, _ = run(*ARGV[1:])
    assert code == 0
    lines = out.splitlines()
    (chosen,) = (line for line in lines if "<- chosen" in line)
    assert chosen.split()[0] == str(standard.batch_size)
    assert sum("too few steps" in line for line in lines) == 3  # 24, 12 and 8
    assert standard.reason in out
    width = {len(line) for line in lines[2 : 3 + len(standard.rows)]}
    assert max(width) < 100


def test_candidates_from_the_command_line(run):
    code, out, _ = run(*ARGV[1:], "--json", "--batch_sizes=256,50000", "--min_steps=1")
    assert code == 0
    assert [row["batch_size"] for row in json.loads(out)["rows"]] == [256, 50_000]


def test_a_config_says_the_rest_and_flags_win(run, standard, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    code, out, _ = run(f"--config={config}", "--num_examples=50000", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == json.loads(json.dumps([vars(r) for r in standard.rows]))
    code, out, _ = run(
        f"--config={config}", "--num_examples=900", "--config.dp.epsilon=3", "--epochs=5", "--json"
    )
    made = json.loads(out)
    assert (made["epsilon"], made["epochs"], made["num_examples"]) == (3, 5, 900)


def test_the_projects_own_config(run):
    code, out, err = run("--config=configs/quickstart.py", "--num_examples=4000", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["num_examples"] == 4000


@pytest.mark.parametrize(
    "argv,message",
    [
        ([], "--num_examples is required (or --config)."),
        (ARGV[1:4], "--delta is required (or --config)."),
        ([*ARGV[1:], "--epsilon=-1"], "epsilon=-1.0 must be > 0 and finite."),
        ([*ARGV[1:], "--delta=0.1"], "delta=0.1 must be < 1/num_examples"),
        ([*ARGV[1:], "--num_examples=many"], "flag --num_examples=many"),
        ([*ARGV[1:], "--epoch=3"], "Unknown command line flag 'epoch'. Did you mean: epochs"),
        ([*ARGV[1:], "--batch_sizes=256,x"], "batch_sizes=256,x must be integers."),
        ([*ARGV[1:], "extra"], "unexpected argument 'extra'."),
        ([*ARGV[1:], "--config=/nowhere.py"], "config='/nowhere.py' is not a file."),
        ([*ARGV[1:], "--plot=/nowhere/x.png", "--batch_sizes=50000"], "No such file"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_exit_with_2(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_mistakes_in_a_config(run, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    code, _, err = run(f"--config={config}")
    assert (code, err) == (2, "error: --num_examples is required (the config does not say).\n")
    code, _, err = run(f"--config={config}", "--config.dp.epsilom=2")
    assert code == 2
    assert 'Did you mean "epsilon"' in err
    config.write_text(CONFIG.replace("dp=dict(epsilon=1.0, delta=1e-5)", "dp=None"))
    code, _, err = run(f"--config={config}", "--num_examples=50000")
    assert (code, "nothing to plan" in err) == (2, True)


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for flag in ("--num_examples", "--plateau_tolerance", "--config", "--plot"):
        assert flag in out


def test_the_figure(tmp_path, monkeypatch):
    path = tmp_path / "noise.png"
    command.plot(path, 500, 8, 1.0, 1e-5)
    height, width, _ = matplotlib.image.imread(path).shape
    assert 400 < height < 1200 < width < 2000


def test_as_a_program_within_its_time(tmp_path, monkeypatch):
    monkeypatch.setenv("DPJAX_CACHE_DIR", "")  # cold
    done = subprocess.run(
        [sys.executable, "-m", "dpjax.commands.plan", *ARGV[1:], "--json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["batch_size"] > 0
    bad = [sys.executable, "-m", "dpjax.commands.plan", "--num_examples=5"]
    assert subprocess.run(bad, capture_output=True, timeout=60, check=False).returncode == 2
