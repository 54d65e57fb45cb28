"""The planner: its table, its choice and its command line."""

import json
import math
import subprocess
import sys

import matplotlib.figure
import matplotlib.image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpjax import dp
from dpjax.build import planner
from dpjax.build.planner import plan
from dpjax.commands import cli
from dpjax.commands import plan as command
from dpjax.dp import accounting

QUESTION = dict(
    num_examples=50_000, epochs=8, epsilon=1.0, delta=1e-5,
    batch_sizes=[*(256 << k for k in range(8)), 50_000],
)  # fmt: skip
ARGV = ["--num_examples=50000", "--epochs=8", "--epsilon=1", "--delta=1e-5"]
SIZES = [1024, 2048, 4096, 8192, 16_384, 50_000]
SOME = "--batch_sizes=" + ",".join(map(str, SIZES))
CONFIG = """
from dpjax.config import default

def get_config():
    config = default()
    config.epochs, config.dp.epsilon, config.dp.delta = 8.0, 1.0, 1e-5
    return config
"""


@pytest.fixture(scope="module")
def standard():
    return plan(**QUESTION)


@pytest.fixture
def run(capsys):
    def call(*argv):
        code = cli.main(["plan", *argv])
        return code, *capsys.readouterr()

    return call


# --- The table -----------------------------------------------------------------------------------


def test_every_column_is_what_it_says(standard):
    assert [row.batch_size for row in standard.rows] == QUESTION["batch_sizes"]
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
    within = 1 + planner.PLATEAU_TOLERANCE
    on_plateau = [row for row in enough if total(row) <= within * lowest]
    low, high = (math.log(on_plateau[end].batch_size) for end in (0, -1))
    place = low + (high - low) / 4
    chosen = min(on_plateau, key=lambda row: abs(math.log(row.batch_size) - place))
    assert standard.batch_size == chosen.batch_size
    assert chosen not in (on_plateau[0], on_plateau[-1])
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
    if round(epochs * num / min(16, num)) == 0:
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
    assert loosest.batch_size == 1024  # a quarter of the way from 256 to 50,000
    strictest = plan(**QUESTION, plateau_tolerance=0.0)
    assert strictest.batch_size == 50_000
    assert "is the lowest of all" in strictest.reason
    by_sampling = [plan(**QUESTION, sampling_noise=s).batch_size for s in (0.0, 10.0, 1e6)]
    assert by_sampling == sorted(by_sampling, reverse=True)
    assert by_sampling[-1] == 1024
    assert plan(**QUESTION, plateau_tolerance=0.0, min_steps=1).batch_size == 50_000
    assert plan(**QUESTION, plateau_tolerance=0.0, min_steps=100).batch_size == 2048


def test_a_data_set_smaller_than_the_smallest_batch():
    made = plan(10, 4, 1.0, 1e-5)
    assert [row.batch_size for row in made.rows] == [10]
    assert made.rows[0].sampling_prob == 1
    assert made.rows[0].steps == 4
    assert made.batch_size == 10
    assert f"No candidate takes {planner.MIN_STEPS} steps" in made.reason
    assert plan(10, 50, 1.0, 1e-5).reason.startswith("B=10 takes T=50 steps")


@pytest.mark.parametrize(
    "num,sizes",
    [
        (16, [16]),
        (17, [16, 17]),
        (1, [1]),
        (100, [16, 32, 64, 100]),
        (600, [16, 32, 64, 128, 256, 512, 600]),
    ],
)
def test_candidates_end_at_the_full_batch_once(num, sizes):
    assert list(planner.candidates(num)) == sizes


def test_less_than_one_epoch_leaves_out_batches_of_less_than_a_step():
    made = plan(50_000, 0.25, 1.0, 1e-5, tol=1e-2)
    assert [row.batch_size for row in made.rows] == [16 << k for k in range(11)]
    assert "Left out, as less than one step: B=32768, 50000" in made.reason
    assert made.rows[-1].steps == 1
    assert made.batch_size == 1024  # 12 steps


def test_given_candidates_in_any_order():
    made = plan(**{**QUESTION, "batch_sizes": [20_000, 25_000, 20_000]})
    assert [row.batch_size for row in made.rows] == [20_000, 25_000]
    only = plan(**{**QUESTION, "batch_sizes": [50_000], "epochs": 4})
    assert only.batch_size == 50_000
    assert f"No candidate takes {planner.MIN_STEPS} steps" in only.reason


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
        (dict(epochs=1e-3), r"epochs=0.001 is less than one step"),
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


def test_two_samplers_stand_side_by_side():
    made = plan(1000, 6, 1.0, 1e-4, batch_sizes=[150, 1000], samplers=planner.SAMPLERS, tol=1e-3)
    row, full = made.rows
    (other,) = row.other
    assert (row.steps, other.steps) == (40, 6 * 7)  # an epoch has round(1000 / 150) steps
    mechanism = dp.calibrated(
        epsilon=1.0, delta=1e-4, num_examples=1000, batch_size=150, epochs=6,
        sampler="random_allocation",
    )  # fmt: skip
    assert (mechanism.steps, mechanism.sampling_prob) == (42, 1 / 7)
    assert other.noise_multiplier == pytest.approx(mechanism.noise_multiplier, rel=3e-3)
    assert other.cumulative_noise == other.noise_multiplier * math.sqrt(42) < row.cumulative_noise
    assert full.other[0].noise_multiplier == full.noise_multiplier
    assert made.sampler_reason.startswith("dp.sampler='random_allocation' needs ")
    assert "exactly once per epoch: it is recommended." in made.sampler_reason
    only = plan(1000, 6, 1.0, 1e-4, batch_sizes=[150], samplers=["random_allocation"], tol=1e-3)
    assert only.rows[0].noise_multiplier == other.noise_multiplier
    assert only.sampler_reason == ""
    with pytest.raises(ValueError, match="samplers='shuffle' must be one of"):
        plan(1000, 6, 1.0, 1e-4, samplers=["shuffle"])
    row = only.rows[0]  # 150 is not a whole share of 1000: there are 7 steps an epoch
    assert row.sampling_prob == pytest.approx(1 / 7)
    assert row.step_noise == pytest.approx(row.noise_multiplier * 7 / 1000)


def test_json_is_one_object_with_the_promised_keys(run):
    standard = plan(**{**QUESTION, "batch_sizes": SIZES})
    code, out, err = run(*ARGV, SOME, "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["batch_size"] == standard.batch_size
    assert made["reason"] == standard.reason
    promised = {"batch_size", "sampling_prob", "steps", "noise_multiplier", "cumulative_noise"}
    assert all(promised <= set(row) for row in made["rows"])
    assert len(made["rows"]) == len(standard.rows)
    assert {item["name"] for item in made["suggestions"]} == {"bound", "learning_rate"}


def test_the_table_is_readable(run):
    standard = plan(**{**QUESTION, "batch_sizes": SIZES, "min_steps": 16})
    code, out, _ = run(*ARGV, SOME, "--min_steps=16")
    assert code == 0
    lines = out.splitlines()
    (chosen,) = (line for line in lines if "<- chosen" in line)
    assert chosen.split()[0] == str(standard.batch_size)
    assert sum("too few steps" in line for line in lines) == 1  # 8
    assert standard.reason in out
    width = {len(line) for line in lines[2 : 4 + len(standard.rows)]}
    assert max(width) < 130
    assert "Poisson sampling         random allocation" in lines[2]
    assert "less noise than 'poisson' at B=2048" in out


def test_candidates_from_the_command_line(run):
    code, out, _ = run(*ARGV, "--json", "--batch_sizes=256,50000", "--min_steps=1")
    assert code == 0
    assert [row["batch_size"] for row in json.loads(out)["rows"]] == [256, 50_000]


def test_a_config_says_the_rest_and_flags_win(run, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    code, out, _ = run(f"--config={config}", "--num_examples=50000", SOME, "--json")
    assert code == 0
    _, flags, _ = run(*ARGV, SOME, "--json")
    assert json.loads(out) == json.loads(flags)
    few = ["--num_examples=900", "--batch_sizes=300"]
    code, out, _ = run(f"--config={config}", *few, "--config.dp.epsilon=3", "--epochs=5", "--json")
    made = json.loads(out)
    assert (made["epsilon"], made["epochs"], made["num_examples"]) == (3, 5, 900)


def test_a_config_s_data_says_how_many_examples_there_are(run):
    """All that train, without what a temperature is fitted on."""
    few = ["--config=configs/quickstart.py", "--batch_sizes=250,500", "--json"]
    code, out, _ = run(*few)
    assert code == 0
    made = json.loads(out)
    assert made["num_examples"] == 4000
    code, out, _ = run(*few, "--config.dp.temperature.share=0.1")
    assert 3500 < json.loads(out)["num_examples"] < 3700  # each by a draw of its own
    assert made["samplers"] == ["random_allocation", "poisson"]  # the config's comes first
    assert made["rows"][0]["steps"] == 15 * 16
    code, out, _ = run(*few, "--config.dp.sampler=poisson")
    made = json.loads(out)
    assert made["samplers"] == ["poisson", "random_allocation"]


@pytest.mark.parametrize(
    "argv,message",
    [
        ([], "--num_examples is required."),
        (ARGV[:3], "--delta is required."),
        ([*ARGV, "--epsilon=-1"], "epsilon=-1.0 must be > 0 and finite."),
        ([*ARGV, "--delta=0.1"], "delta=0.1 must be < 1/num_examples"),
        ([*ARGV, "--num_examples=many"], "argument --num_examples: invalid int value: 'many'"),
        ([*ARGV, "--epoch=3"], "--epoch is not a flag of this command. Did you mean '--epochs'?"),
        ([*ARGV, "--batch_sizes=256,x"], "argument --batch_sizes: '256,x' must be whole numbers."),
        ([*ARGV, "extra"], "unrecognized arguments: extra"),
        ([*ARGV, "--config=/nowhere.py"], "config='/nowhere.py' is neither a file nor one of"),
        ([*ARGV, "--plot=/nowhere/x.png"], "must be a .png in a folder that exists"),
        ([*ARGV, "--plot=x.xyz"], "--plot='x.xyz' must be a .png"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_exit_with_2(run, argv, message):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("dpjax plan: ")
    assert message in err
    assert err.count("\n") == 1


def test_mistakes_in_a_config(run, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(CONFIG)
    code, _, err = run(f"--config={config}", "--config.data.name=nothing_like_it")
    assert code == 2
    assert err.startswith(
        "dpjax plan: --num_examples is required, because the config's data cannot"
    )
    assert err.count("\n") == 1
    code, _, err = run(f"--config={config}", "--config.dp.epsilom=2")
    assert code == 2
    assert "did you mean 'epsilon'?" in err
    config.write_text(CONFIG.replace("return", "config.dp = None; return"))
    code, _, err = run(f"--config={config}", "--num_examples=50000")
    assert (code, "nothing to plan" in err) == (2, True)


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for flag in ("--num_examples", "--plateau_tolerance", "--config", "--plot"):
        assert flag in out


@pytest.mark.parametrize(
    "sizes", [[128, 500], [500], pytest.param([16, 100], marks=pytest.mark.slow)]
)
def test_the_figure(sizes, tmp_path, monkeypatch):
    """It has the candidates that were asked for, and the choice among them."""
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k))
    )
    path = tmp_path / "noise.png"
    command.plot(path, 500, 8, 1.0, 1e-5, batch_sizes=sizes)  # both samplers
    height, width, _ = matplotlib.image.imread(path).shape
    assert 400 < height < 1200 < width < 2000
    lines = drawn[0].axes[1].get_lines()
    (curve, *_) = [line for line in lines if line.get_linewidth() == 2.6]
    assert list(curve.get_xdata()) == sizes
    (chosen,) = {line.get_xdata()[0] for line in lines if line.get_linestyle() == ":"}
    assert chosen == plan(500, 8, 1.0, 1e-5, batch_sizes=sizes).batch_size


@pytest.mark.slow  # a cold start
def test_as_a_program_within_its_time(tmp_path, monkeypatch):
    monkeypatch.setenv("DPJAX_CACHE_DIR", "")  # cold
    done = subprocess.run(
        [sys.executable, "-m", "dpjax", "plan", *ARGV, SOME, "--json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["batch_size"] > 0
    bad = [sys.executable, "-m", "dpjax", "plan", "--num_examples=5"]
    assert subprocess.run(bad, capture_output=True, timeout=60, check=False).returncode == 2
