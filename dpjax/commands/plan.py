"""Plans a private run from N, epochs, epsilon and delta alone; no data is touched.

    python -m dpjax.commands.plan --num_examples=50000 --epochs=8 --epsilon=1 --delta=1e-5
    python -m dpjax.commands.plan --config=configs/quickstart.py --num_examples=4000 --plot=a.png

Prints a table (with --json one JSON object) of every batch size that doubles from 256 to the full
batch: q = B/N, T = round(E N / B), the noise multiplier sigma that the budget asks for, and what
follows from it. Picks the batch size by the rule of Rehn et al. 2025 (2510.20616), explained in
`dpjax.build.planner.plan`, and proposes ranges of the clip bound and the learning rate to search.

With --config, flags that are not given are read from the config: epsilon and delta from config.dp,
epochs from config.epochs, and N from config.data.num_examples where there is such a field.
Exit codes: 0 planned, 2 a mistake in the command or an impossible budget.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from dpjax.build import planner

__all__ = ["main", "plot", "table"]


def table(plan: planner.Plan) -> str:
    """The plan as text."""
    lines = [
        f"N={plan.num_examples}  epochs={plan.epochs:g}  epsilon={plan.epsilon:g}  "
        f"delta={plan.delta:g}  (add or remove one example; Poisson sampling; PLD accountant)",
        "",
        f"{'B':>8} {'q':>9} {'T':>7} {'sigma':>9} {'sigma sqrt(T)':>14} {'sigma/q':>9} "
        f"{'sigma/B':>9}  plateau",
    ]
    for row in plan.rows:
        note = f"{100 * row.above_plateau:+.1f}%" if row.enough_steps else "too few steps"
        mark = "  <- chosen" if row.batch_size == plan.batch_size else ""
        lines.append(
            f"{row.batch_size:>8} {row.sampling_prob:>9.4g} {row.steps:>7} "
            f"{row.noise_multiplier:>9.4g} {row.cumulative_noise:>14.4g} "
            f"{row.noise_over_prob:>9.4g} {row.step_noise:>9.2e}  {note}{mark}"
        )
    lines += ["", plan.reason]
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

    all_epochs = (epochs / 4, epochs, 4 * epochs)
    all_epsilons = sorted({0.5, 1.0, 2.0, 8.0, float(epsilon)})
    colours = plt.get_cmap("viridis")
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.8), sharex=True, layout="constrained")
    for axes, some_epochs in zip(panels, all_epochs):
        for index, eps in enumerate(all_epsilons):
            try:
                made = planner.plan(num_examples, some_epochs, eps, delta, tol=3e-3, **rule)
            except ValueError:  # less than one step
                continue
            sizes = [row.batch_size for row in made.rows]
            noise = [row.cumulative_noise for row in made.rows]
            colour = colours(0.92 * index / max(1, len(all_epsilons) - 1))
            width = 2.6 if eps == epsilon else 1.2
            axes.plot(sizes, noise, ".-", color=colour, lw=width, label=f"epsilon {eps:g}")
            at = sizes.index(made.batch_size)
            axes.plot(sizes[at], noise[at], "o", ms=11, mfc="none", mec=colour, mew=2)
        most = some_epochs * num_examples / rule.get("min_steps", planner.MIN_STEPS)
        marks = planner.candidates(num_examples)
        limits = (0.8 * marks[0], 1.25 * num_examples)
        axes.axvspan(min(most, limits[1]), limits[1], color="0.9", zorder=0)
        axes.set(xscale="log", yscale="log", xlim=limits, title=f"{some_epochs:g} epochs")
        axes.set_xlabel("expected batch size B")
        axes.set_xticks(marks[:-1:2] if len(marks) > 4 else marks)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("cumulative noise  sigma sqrt(T)  [clip bounds]")
    panels[0].plot([], [], "o", ms=11, mfc="none", mec="0.3", mew=2, label="chosen")
    panels[0].fill_between([], [], color="0.9", label="too few steps")
    panels[0].legend(fontsize="small")
    figure.suptitle(f"N = {num_examples}, delta = {delta:g}: noise added over the whole run")
    figure.savefig(path, dpi=110)
    plt.close(figure)


class _Mistake(Exception):
    pass


def _flags() -> flags.FlagValues:
    """Flags of this command alone: importing it defines none, so that others may."""
    values = flags.FlagValues()
    of: Any = {"flag_values": values}
    config_flags.DEFINE_config_file("config", None, "Config file to read the rest from", **of)
    flags.DEFINE_integer("num_examples", None, "N, number of private training examples", **of)
    flags.DEFINE_float("epochs", None, "E, passes over the data", **of)
    flags.DEFINE_float("epsilon", None, "Budget in nats", **of)
    flags.DEFINE_float("delta", None, "Budget, below 1/N", **of)
    flags.DEFINE_list("batch_sizes", None, "Candidates; 256 doubling to N by default", **of)
    flags.DEFINE_integer("min_steps", planner.MIN_STEPS, "Fewer steps are avoided", **of)
    flags.DEFINE_float(
        "plateau_tolerance",
        planner.PLATEAU_TOLERANCE,
        "Fraction above the lowest total noise that still is its plateau",
        **of,
    )
    flags.DEFINE_float(
        "sampling_noise",
        planner.SAMPLING_NOISE,
        "Noise of sampling that is added in quadrature, in clip bounds per sqrt(epoch)",
        **of,
    )
    flags.DEFINE_bool("json", False, "Print one JSON object instead of a table", **of)
    flags.DEFINE_string("plot", None, "PNG to draw sigma sqrt(T) against B in", **of)
    flags.DEFINE_bool("help", False, "Show this help", short_name="h", **of)
    return values


def _arguments(values: flags.FlagValues) -> dict[str, Any]:
    """Arguments of `plan`: flags first, then the config."""
    config = values["config"].value
    known = _from_config(config) if config is not None else {}
    arguments: dict[str, Any] = {}
    for name in ("num_examples", "epochs", "epsilon", "delta"):
        given = values[name].value
        arguments[name] = known.get(name) if given is None else given
        if arguments[name] is None:
            also = "the config does not say" if config is not None else "or --config"
            raise _Mistake(f"--{name} is required ({also}).")
    sizes: list[str] | None = values["batch_sizes"].value
    if sizes is not None and not all(size.strip().isdigit() for size in sizes):
        raise _Mistake(f"batch_sizes={','.join(sizes)} must be integers.")
    arguments["batch_sizes"] = None if sizes is None else [int(size) for size in sizes]
    for name in ("min_steps", "plateau_tolerance", "sampling_noise"):
        arguments[name] = values[name].value
    return arguments


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of the run, without loading any data."""
    private = config.get("dp")
    if private is None:
        raise _Mistake("config.dp=None trains without privacy: there is nothing to plan.")
    return {
        "num_examples": config.get("data", {}).get("num_examples"),
        "epochs": config.get("epochs"),
        "epsilon": private.get("epsilon"),
        "delta": private.get("delta"),
    }


def main() -> int:
    """Runs the command in sys.argv (where ml_collections looks for overrides); the exit code."""
    values = _flags()
    try:
        for argument in sys.argv[1:]:
            name, _, file = argument.lstrip("-").partition("=")
            if name == "config" and not pathlib.Path(file.split(":")[0]).is_file():
                raise _Mistake(f"config={file!r} is not a file.")
        rest = values(sys.argv)
        if values["help"].value:
            print(f"{__doc__}\n{values.get_help(include_special_flags=False)}")
            return 0
        if len(rest) > 1:
            raise _Mistake(f"unexpected argument {rest[1]!r}.")
        arguments = _arguments(values)
        made = planner.plan(**arguments)
        if values["plot"].value:
            plot(values["plot"].value, **arguments)
    except (
        _Mistake,
        flags.Error,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OSError,
    ) as e:
        print("error:", *str(e).strip('"').replace("\\n", " ").split(), file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(made)) if values["json"].value else table(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
