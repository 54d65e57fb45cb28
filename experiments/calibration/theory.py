"""Theory of the study `calibration`: kernels of clipped gradient flow (Bu et al., 2106.07830)."""

from __future__ import annotations

import jax
import numpy as np
from matplotlib import pyplot as plt

from dpjax import dp
from experiments.calibration import ntk
from experiments.study import Figure, Row, Table

__all__ = ["compute", "kernel_table", "parts"]

# Random networks of the table; width, noise keys and learning rates of the training curves.
_THEORY: dict[str, tuple[int, int, int, tuple[float, ...]]] = {
    "smoke": (20, 64, 8, (0.2,)),
    "laptop": (200, 256, 32, (0.4, 0.1)),
    "paper": (1000, 512, 64, (0.4, 0.1)),
}


def compute(size: str) -> Row:
    """Computes the table of kernels, and predicted beside measured training curves."""
    draws, width, runs, rates = _THEORY[size]
    found: dict[str, list[Row]] = {kind: [] for kind in ntk.KINDS}
    for draw in range(draws):
        of_data, of_net = jax.random.split(jax.random.key(draw))
        data, params = ntk.problem(of_data, 8, 3), ntk.init(of_net, 3, 4)
        residual = np.asarray(jax.vmap(ntk.outputs, (None, 0))(params, data.inputs) - data.targets)
        each = ntk.layer_kernels(params, data.inputs)
        for kind, kernel in ntk.kernels(each, np.asarray(residual, np.float64)).items():
            found[kind].append(ntk.properties(kernel))
    of_data, of_net = jax.random.split(jax.random.key(7))
    data, params = ntk.problem(of_data, 16, 4), ntk.init(of_net, 4, width)
    sigma, time = 2.0, 8.0
    curves = []
    for name, rule in (("flat", dp.flat(0.5)), ("layerwise", dp.per_layer(0.5))):
        flow = ntk.predict(params, data, rule, time=time, points=200)
        for rate in rates:
            steps = round(time / rate)
            keys = jax.random.split(jax.random.key(len(curves)), runs)
            quiet, noisy = ntk.measure(
                params, data, rule, learning_rate=rate, steps=steps, noise_multiplier=sigma,
                keys=keys,
            )  # fmt: skip
            curves.append({
                "clipping": name, "eta": rate, "sigma": sigma,
                "times": (rate * np.arange(steps + 1)).tolist(), "quiet": quiet.tolist(),
                "noisy": noisy.mean(axis=0).tolist(),
                "spread": (noisy.std(axis=0, ddof=1) / runs**0.5).tolist(),
                "flow_times": flow.times.tolist(), "flow": flow.loss.tolist(),
                "flow_excess": (rate * sigma**2 * flow.excess).tolist(),
            })  # fmt: skip
    return {"properties": found, "curves": curves}


def kernel_table(properties: dict[str, list[Row]]) -> list[Row]:
    """Returns the paper's table of kernels in numbers: extremes over random networks, a verdict."""
    rows = []
    for kind, draws in properties.items():
        asymmetry = max(d["asymmetry"] for d in draws)
        quadratic = min(d["quadratic"] for d in draws)
        eigenvalue = min(d["eigenvalue"] for d in draws)
        negative = [d["eigenvalue"] < -1e-6 for d in draws]
        rows.append({
            "clipping": kind, "kernel": ntk.KINDS[kind],
            "symmetric": _yes(asymmetry < 1e-9), "largest asymmetry": asymmetry,
            "quadratic form >= 0": _yes(quadratic > -1e-6), "least quadratic form": quadratic,
            "eigenvalues >= 0": _yes(eigenvalue > -1e-6), "least real part": eigenvalue,
            "networks with a negative one": f"{sum(negative)} of {len(negative)}",
        })  # fmt: skip
    return rows


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def parts(found: Row) -> list[str | Table | Figure]:
    """Returns the theory part of the report, from the results of `compute`."""
    curves = found["curves"]
    figure, panels = plt.subplots(
        1, len(curves), figsize=(4 * len(curves), 4), sharey=True, layout="constrained"
    )
    rows = []
    for axes, c in zip(panels, curves):
        flow = np.interp(c["times"], c["flow_times"], c["flow"])
        excess = np.interp(c["times"], c["flow_times"], c["flow_excess"])
        quiet, noisy, spread = (np.array(c[name]) for name in ("quiet", "noisy", "spread"))
        axes.plot(c["times"], quiet, "o", ms=3, markevery=max(1, len(quiet) // 20), color="C0",
                  label="measured, no noise (not private)")  # fmt: skip
        axes.plot(c["times"], flow, color="C0", label="predicted flow")
        axes.errorbar(c["times"], noisy, 2 * spread, fmt="s", ms=3, color="C1",
                      errorevery=max(1, len(noisy) // 20), markevery=max(1, len(noisy) // 20),
                      label=f"measured, sigma = {c['sigma']:g} (± 2 s.e.)")  # fmt: skip
        axes.plot(c["times"], flow + excess, "--", color="C1", label="predicted, with noise")
        axes.set(xlabel="time = eta x steps", title=f"{c['clipping']}, eta = {c['eta']:g}")
        axes.grid(alpha=0.3)
        rows.append({
            "clipping": c["clipping"], "eta": c["eta"], "loss at start": quiet[0],
            "loss at end, measured": quiet[-1], "predicted": flow[-1],
            "largest gap, relative to the start": float(np.abs(quiet - flow).max() / quiet[0]),
            "excess by noise, measured": noisy[-1] - quiet[-1],
            "2 s.e.": 2 * spread[-1], "excess predicted": excess[-1],
        })  # fmt: skip
    panels[0].set_ylabel("training loss")
    panels[0].legend(fontsize=8)
    draws = len(next(iter(found["properties"].values())))
    return [
        Table("kernels", f"Kernels of {draws} random networks (3 layers, width 4, 8 examples); "
              "numbers relative to the spectral norm", kernel_table(found["properties"])),
        "The last row is what keeping and dropping does: where an example is dropped, the kernel "
        "is neither symmetric nor monotone. The paper's two rows for global clipping hold where "
        "all examples are kept.",
        Table("dynamics", "Function-space prediction and measured training loss", rows),
        Figure("dynamics", "Training loss predicted by the kernels of the start, and measured",
               figure),
    ]  # fmt: skip
