"""The theory of the study `lp_ft`: simulated two-layer networks beside their bounds."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib import pyplot as plt

from dpjax import dp
from experiments.lp_ft import langevin, two_layer
from experiments.study import Figure, Row, Table

__all__ = ["compute", "parts"]

# Noise of the toy: DP-SGD on 500 examples (STL-10's number), B = 100, 30 epochs, delta 1e-4, a
# bound of 10, above its gradients, and steps that cover its time.
_TOY = {"num_examples": 500, "batch_size": 100, "epochs": 30.0, "delta": 1e-4}
_BOUND, _TIME = 10.0, 4.0
# Epsilons, shares, simulated paths, Euler step.
_SIZES: dict[str, tuple[tuple[float, ...], tuple[float, ...], int, float]] = {
    "smoke": ((0.5, 8.0), (0.0, 0.5, 1.0), 50, 0.02),
    "laptop": ((0.25, 1.0, 8.0), tuple(i / 10 for i in range(11)), 200, 0.01),
    "paper": ((0.25, 0.5, 1.0, 2.0, 8.0), tuple(i / 20 for i in range(21)), 2000, 0.005),
}


def compute(size: str) -> Row:
    """Simulates the networks beside their bounds, for every share and epsilon."""
    epsilons, shares, paths, step = _SIZES[size]
    rows, curves = [], []
    levels = {}
    for epsilon in epsilons:
        mechanism = dp.calibrated(epsilon=epsilon, **_TOY)
        levels[epsilon] = two_layer.noise_level(
            learning_rate=_TIME / mechanism.steps, noise_multiplier=mechanism.noise_multiplier,
            bound=_BOUND, batch_size=_TOY["batch_size"],
        )  # fmt: skip
    for relu in (False, True):
        task, body = two_layer.problem(jax.random.key(3), relu=relu)
        width = len(body)
        random = np.asarray(jax.random.normal(jax.random.key(5), (width,))) / width**0.5
        for head, start in (("random", random), ("zero", np.zeros(width))):
            theta = two_layer.Theta(body, start)
            for epsilon, noise in levels.items():
                for share in shares:
                    common = {"time": _TIME, "step": step, "share": share}
                    bounds = langevin.split_bounds(theta, task, noise, **common)
                    runs = two_layer.simulate(
                        theta, task, noise, paths=paths, key=jax.random.key(11), **common
                    )
                    left = langevin.left_tube(runs, theta, task, noise, step=step, share=share)
                    error = runs.loss.std(axis=0, ddof=1) / paths**0.5
                    network = "ReLU" if relu else "linear"
                    about = {"network": network, "head": head, "epsilon": epsilon, "s": noise}
                    rows.append({
                        **about, "LP share": share, "lower": bounds.lower[-1],
                        "measured": float(runs.loss[:, -1].mean()),
                        "2 s.e.": float(2 * error[-1]), "upper": bounds.upper[-1],
                        "linearized": bounds.linearized[-1], "left": left,
                    })  # fmt: skip
                    if share in (0.0, 0.5, 1.0) and epsilon == epsilons[len(epsilons) // 2]:
                        curves.append({
                            **about, "share": share, "times": runs.times.tolist(),
                            "measured": runs.loss.mean(axis=0).tolist(),
                            "error": (2 * error).tolist(),
                            **{name: getattr(bounds, name)[:: two_layer.EVERY].tolist()
                               for name in ("lower", "upper", "linearized")},
                        })  # fmt: skip
    return {"rows": rows, "curves": curves}


def parts(found: Row) -> list[str | Table | Figure]:
    """Returns tables and figures of the results of `compute`."""
    rows, curves = found["rows"], found["curves"]
    best = []
    for network, head, epsilon in dict.fromkeys(
        (r["network"], r["head"], r["epsilon"]) for r in rows
    ):
        same = [
            r for r in rows if (r["network"], r["head"], r["epsilon"]) == (network, head, epsilon)
        ]
        least = min(same, key=lambda r: r["measured"])
        tied = [r["LP share"] for r in same
                if r["measured"] - r["2 s.e."] <= least["measured"] + least["2 s.e."]]  # fmt: skip
        best.append({
            "network": network, "head": head, "epsilon": epsilon, "s": same[0]["s"],
            "best share, measured": least["LP share"],
            "shares within 2 s.e.": f"{min(tied):g} to {max(tied):g}",
            "predicted, linearized": min(same, key=lambda r: r["linearized"])["LP share"],
            "predicted, upper bound": min(same, key=lambda r: r["upper"])["LP share"],
            "outside the bounds": sum(
                not r["lower"] - r["2 s.e."] <= r["measured"] <= r["upper"] + r["2 s.e."]
                for r in same
            ),
            "left the tube, largest": max(r["left"] for r in same),
        })  # fmt: skip
    return [
        "The bounds and the linearized prediction are our own derivation from stated assumptions "
        "(see `experiments/lp_ft/langevin.py`); they replace the paper's formulas, which we could "
        "not read. The noise s follows from epsilon by the accountant for a nominal run of "
        f"{_TOY['num_examples']} examples, B = {_TOY['batch_size']}, {_TOY['epochs']:g} epochs.",
        Table("theory_best", "Predicted and simulated best share of probing", best),
        Table("theory", "Loss at the end of the run: simulation, bounds, prediction", rows),
        _theory_shares(rows), _theory_curves(curves),
    ]  # fmt: skip


def _theory_shares(rows: list[Row]) -> Figure:
    settings = list(dict.fromkeys((r["network"], r["head"]) for r in rows))
    epsilons = sorted({r["epsilon"] for r in rows})
    figure, panels = plt.subplots(
        1, len(settings), figsize=(4 * len(settings), 4), layout="constrained"
    )
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(epsilons)))
    for axes, (network, head) in zip(panels, settings):
        for epsilon, color in zip(epsilons, colors):
            told = (network, head, epsilon)
            same = [r for r in rows if (r["network"], r["head"], r["epsilon"]) == told]
            shares = [r["LP share"] for r in same]
            axes.errorbar(shares, [r["measured"] for r in same], [r["2 s.e."] for r in same],
                          fmt="o", ms=4, color=color, label=f"epsilon {epsilon:g}")  # fmt: skip
            axes.plot(shares, [r["linearized"] for r in same], color=color)
        axes.set(xlabel="share of time that probes", yscale="log", title=f"{network}, {head} head")
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("loss at the end")
    panels[0].legend(fontsize=8)
    caption = (
        "Simulated loss at the end (dots, ± 2 s.e.) and linearized prediction (lines) by share"
    )
    return Figure("theory_shares", caption, figure)


def _theory_curves(curves: list[Row]) -> Figure:
    settings = list(dict.fromkeys((c["network"], c["head"]) for c in curves))
    figure, panels = plt.subplots(
        1, len(settings), figsize=(4 * len(settings), 4), layout="constrained"
    )
    for axes, (network, head) in zip(panels, settings):
        same = [c for c in curves if (c["network"], c["head"]) == (network, head)]
        for index, c in enumerate(same):
            color = f"C{index}"
            axes.fill_between(c["times"], c["lower"], c["upper"], color=color, alpha=0.15)
            axes.plot(c["times"], c["linearized"], color=color, lw=1)
            axes.plot(c["times"], c["measured"], "o", ms=3, color=color, markevery=2,
                      label=f"share {c['share']:g}")  # fmt: skip
        axes.set(xlabel="time", yscale="log",
                 title=f"{network}, {head} head\nepsilon {same[0]['epsilon']:g}")  # fmt: skip
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("expected loss")
    panels[0].legend(fontsize=8)
    caption = "Simulated loss (dots), bounds (bands; exact while probing), linearized (lines)"
    return Figure("theory_curves", caption, figure)
