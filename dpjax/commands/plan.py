"""Plan a private run from N, epochs, epsilon and delta alone; no data is touched.

    dpjax plan --num_examples=50000 --epochs=8 --epsilon=1 --delta=1e-5
    dpjax plan --config=quickstart --num_examples=4000 --plot=noise.png

Prints a table (with --json one JSON object) of every batch size that doubles from 16 to the full
batch: q = B/N, T = round(E N / B), the noise multiplier sigma that the budget asks for, and what
follows from it. The noise of random allocation (dp.sampler=random_allocation) stands beside that of
Poisson sampling, and one of the two is recommended. Picks the batch size by the rule of Rehn et al.
2025 (2510.20616), explained in `dpjax.build.planner.plan`, and proposes ranges of the clip bound
and the learning rate to search.

With --config, epsilon, delta and epochs are read from the config where no flag gives them, and N
from its data set, if that is prepared.
Exit codes: 0 planned, 2 a mistake in the command or an impossible budget.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from dpjax.build import data, model, planner, privacy
from dpjax.commands import cli

_TITLES = {"poisson": "Poisson sampling", "random_allocation": "random allocation"}


def table(plan: planner.Plan) -> str:
    """The plan as text."""
    lines = [
        f"N={plan.num_examples}  epochs={plan.epochs:g}  epsilon={plan.epsilon:g}  "
        f"delta={plan.delta:g}  (add or remove one example)",
        "",
        f"{'':>42}{_TITLES[plan.samplers[0]]:>24}"
        + "".join(f"{_TITLES[name]:>26}" for name in plan.samplers[1:]),
        f"{'B':>8} {'q':>9} {'T':>7} {'sigma/q':>9} {'sigma/B':>9} "
        + " ".join(f"{'sigma':>9} {'sigma sqrt(T)':>14} " for _ in plan.samplers)
        + " plateau",
    ]
    for row in plan.rows:
        note = f"{100 * row.above_plateau:+.1f}%" if row.enough_steps else "too few steps"
        mark = "  <- chosen" if row.batch_size == plan.batch_size else ""
        lines.append(
            f"{row.batch_size:>8} {row.sampling_prob:>9.4g} {row.steps:>7} "
            f"{row.noise_over_prob:>9.4g} {row.step_noise:>9.2e} "
            + " ".join(
                f"{sigma:>9.4g} {cumulative:>14.4g} "
                for sigma, cumulative in [
                    (row.noise_multiplier, row.cumulative_noise),
                    *((noise.noise_multiplier, noise.cumulative_noise) for noise in row.other),
                ]
            )
            + f" {note}{mark}"
        )
    lines += ["", plan.reason]
    lines += [plan.sampler_reason] if plan.sampler_reason else []
    for item in plan.suggestions:
        lines += ["", f"{item.name}: search {item.low:g} to {item.high:g}"]
        lines += [f"  - {reason}" for reason in item.reasons]
    return "\n".join(lines)


def plot(
    path: str | pathlib.Path,
    num_examples: int,
    epochs: float,
    epsilon: float,
    delta: float,
    **rule: Any,
) -> None:
    """Draws sigma sqrt(T) against B as PNG, for a quarter, once and four times the epochs.

    The candidates are those asked for, and the choice is marked. The rule's sampler is drawn solid,
    the other one dashed.

    Args:
        path: of the PNG.
        num_examples: N.
        epochs: E, of the middle panel.
        epsilon: drawn thick, among 0.5, 1, 2 and 8.
        delta: in (0, 1/N).
        **rule: batch_sizes, min_steps and the like, as in `planner.plan`.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    rule.setdefault("samplers", planner.SAMPLERS)
    chosen = planner.plan(num_examples, epochs, epsilon, delta, **rule).batch_size
    all_epochs = (epochs / 4, epochs, 4 * epochs)
    all_epsilons = sorted({0.5, 1.0, 2.0, 8.0, float(epsilon)})
    colors = plt.get_cmap("viridis")
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), sharex=True, layout="constrained")
    for axes, some_epochs in zip(panels, all_epochs):
        for index, eps in enumerate(all_epsilons):
            try:
                made = planner.plan(num_examples, some_epochs, eps, delta, tol=3e-3, **rule)
            except ValueError:  # less than one step
                continue
            sizes = [row.batch_size for row in made.rows]
            noise = [row.cumulative_noise for row in made.rows]
            color = colors(0.92 * index / max(1, len(all_epsilons) - 1))
            width = 2.6 if eps == epsilon else 1.2
            axes.plot(sizes, noise, ".-", color=color, lw=width, label=f"epsilon {eps:g}")
            if made.rows[0].other:
                others = [row.other[0].cumulative_noise for row in made.rows]
                axes.plot(sizes, others, ".--", color=color, lw=width)
            at = sizes.index(made.batch_size)
            axes.plot(sizes[at], noise[at], "o", ms=11, mfc="none", mec=color, mew=2)
        most = some_epochs * num_examples / rule.get("min_steps", planner.MIN_STEPS)
        axes.axvline(chosen, color="0.6", lw=1, ls=":", zorder=0)
        marks = rule.get("batch_sizes") or planner.candidates(num_examples)
        marks = sorted(set(marks))
        limits = (0.8 * marks[0], 1.25 * marks[-1])
        axes.axvspan(min(most, limits[1]), limits[1], color="0.9", zorder=0)
        axes.set(xscale="log", yscale="log", xlim=limits, title=f"{some_epochs:g} epochs")
        axes.set_xlabel("expected batch size B")
        axes.set_xticks(marks[:: -(-len(marks) // 6)])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("cumulative noise  sigma sqrt(T)  [clip bounds]")
    for name, style in zip(rule["samplers"], ("-", "--")):
        panels[0].plot([], [], style, color="0.3", label=_TITLES[name])
    panels[0].plot([], [], "o", ms=11, mfc="none", mec="0.3", mew=2, label="chosen for it")
    panels[0].plot([], [], ":", color="0.6", label=f"chosen here: {chosen}")
    panels[0].fill_between([], [], color="0.9", label="too few steps")
    panels[0].legend(fontsize="small")
    figure.suptitle(f"N = {num_examples}, delta = {delta:g}: noise added over the whole run")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def add_arguments(parser: cli.Parser) -> None:
    parser.add_config(required=False)
    parser.add_argument("--num_examples", type=int, help="N, number of private training examples")
    parser.add_argument("--epochs", type=float, help="E, passes over the data")
    parser.add_argument("--epsilon", type=float, help="budget in nats")
    parser.add_argument("--delta", type=float, help="budget, below 1/N")
    parser.add_argument(
        "--batch_sizes", type=_whole_numbers, metavar="B,B,...",
        help="candidates; by default 16 doubling to N",
    )  # fmt: skip
    parser.add_argument(
        "--min_steps", type=int, default=planner.MIN_STEPS, help="fewer steps are avoided"
    )
    parser.add_argument(
        "--plateau_tolerance", type=float, default=planner.PLATEAU_TOLERANCE,
        help="fraction above the lowest total noise that still is its plateau",
    )  # fmt: skip
    parser.add_argument(
        "--sampling_noise", type=float, default=planner.SAMPLING_NOISE,
        help="noise of sampling, added in quadrature, in clip bounds per sqrt(epoch)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    parser.add_argument("--plot", type=cli.path, metavar="PNG", help="draw sigma sqrt(T) against B")


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers.") from error


def _num_examples(config: ConfigDict) -> int:
    """N of a config's data set, without what is reserved for fitting a temperature."""
    spec = model.tuned(config, num_classes=2).model.input
    try:
        train, _ = data.opened(config, spec)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"--num_examples is required, because the config's data cannot be opened: {error}"
        ) from error
    train, _ = privacy.temperature(config, train)
    return len(train)


@cli.mistakes()
def run(args: argparse.Namespace) -> int:
    known: dict[str, Any] = {}
    samplers = list(planner.SAMPLERS)
    if args.config is not None:
        config = cli.config(args)
        if config.dp is None:
            raise ValueError("config.dp=None trains without privacy: there is nothing to plan.")
        known = {
            "epochs": config.epochs, "epsilon": config.dp.epsilon, "delta": config.dp.delta,
        }  # fmt: skip
        if args.num_examples is None:
            known["num_examples"] = _num_examples(config)
        # The rule is applied to the config's own sampler, if it is one of the two.
        samplers.sort(key=lambda name: name != config.dp.sampler)
    arguments: dict[str, Any] = {"samplers": samplers}
    for name in ("num_examples", "epochs", "epsilon", "delta"):
        given = getattr(args, name)
        arguments[name] = known.get(name) if given is None else given
        if arguments[name] is None:
            raise ValueError(f"--{name} is required.")
    for name in ("batch_sizes", "min_steps", "plateau_tolerance", "sampling_noise"):
        arguments[name] = getattr(args, name)
    if args.plot is not None and not (
        args.plot.suffix.lower() == ".png" and args.plot.parent.is_dir()
    ):
        raise ValueError(f"--plot={str(args.plot)!r} must be a .png in a folder that exists.")
    plan = planner.plan(**arguments)
    if args.plot is not None:
        plot(args.plot, **arguments)
    print(json.dumps(dataclasses.asdict(plan)) if args.json else table(plan))
    return 0
