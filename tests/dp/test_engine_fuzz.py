"""The book-keeping engine against JAX on random loss programs; see `fuzz_programs`."""

import collections
import itertools
import os

import fuzz_programs
import jax
import pytest

from dpjax.dp.engines import sites, tracing

# The programs of every day: of the first 600, those that show every kind in the least time.
EVERYDAY = (
    8, 10, 13, 14, 15, 22, 33, 34, 38, 52, 62, 63, 64, 67, 68, 69, 83, 84, 91, 97, 100, 117,
    121, 124, 131, 135, 143, 144, 145, 153, 163, 169, 170, 193, 197, 199, 200, 207, 212, 213,
    217, 220, 221, 227, 228, 229, 249, 260, 264, 270, 272, 274, 281, 296, 299, 313, 323, 332,
    342, 343, 345, 348, 366, 369, 387, 397, 407, 408, 411, 416, 424, 428, 437, 440, 442, 455,
    459, 466, 479, 480, 482, 485, 491, 493, 494, 500, 512, 519, 527, 532, 536, 538, 546, 554,
    560, 564, 566, 582, 583, 594,
)  # fmt: skip
SHARE = 25  # programs that one test runs
MANY = int(os.environ.get("DPJAX_FUZZ", "10000"))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """No program is compiled twice, so none is worth a file."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)
    jax.clear_caches()


def report(seed, failure, *, smaller=False):
    program = fuzz_programs.generate(seed)
    if smaller:
        program = fuzz_programs.shrink(program, failure.kind, fuzz_programs.rule_of(seed))
    return f"{failure.kind}: {failure.text}\n{fuzz_programs.describe(program)}"


@pytest.mark.parametrize("start", range(0, len(EVERYDAY), SHARE))
def test_random_programs_give_the_gradients_of_single_examples_within_the_bound(start):
    results = list(fuzz_programs.failures(EVERYDAY[start : start + SHARE]))
    failed = [(seed, failure) for seed, failure in results if failure]
    assert not failed, report(*failed[0], smaller=True)
    assert len(results) >= 0.9 * SHARE  # JAX itself can run nearly all of them


@pytest.mark.slow
def test_many_random_programs():
    kinds, failed = collections.Counter(), []
    for seed, failure in fuzz_programs.failures(range(MANY)):
        kinds[failure.kind if failure else "agree"] += 1
        failed += [report(seed, failure)] if failure else []
    print(*failed, dict(kinds), sep="\n")
    assert not failed, f"{len(failed)} of {kinds.total()} programs: {dict(kinds)}"


def operations(block):
    for step in block.steps:
        yield step.op, step.options
        inner = step.options.get("blocks", [step.options.get("block")])
        for part in inner:
            if part is not None:
                yield from operations(part)


def weights_of(program):
    """The trace of a program, and its weights as the engine groups their uses."""
    params, batch = fuzz_programs.numbers_of(program)
    example = {k: v[0] for k, v in batch.items()}
    traced = tracing.trace(fuzz_programs.loss_of(program), params, example)
    return traced, [*traced.groups, *itertools.chain(*traced.mixed)]


def test_the_programs_of_every_day_are_of_every_kind():
    seen, kinds, several = set(), collections.Counter(), 0
    for seed in EVERYDAY:
        program = fuzz_programs.generate(seed)
        for op, options in operations(program.block):
            seen |= {op, (op, options.get("how")), *((op, r) for r in options.get("roles", ()))}
        traced, weights = weights_of(program)
        several += any(len(weight) > 1 for weight in weights)
        kinds.update({w[0].kind if w[0].view else "derived" for w in weights})
        kinds.update({"mixed" for _ in traced.mixed} | {"scalar" for _ in traced.scalars})
    assert len(set(fuzz_programs.OPS) - seen) <= 4
    assert seen >= {("scan", role) for role in ("const", "xs", "carry", "decay", "indexed")}
    assert seen >= {("call", how) for how in ("jit", "remat", "custom_vjp", "gradient")}
    assert min(kinds[kind] for kind in ("dot", "conv", "embed", "derived", "mixed")) >= 20, kinds
    assert several >= 40
    assert seen >= {"spectral", "unit", "gained", "gated"}


def without_layout(identity):
    """The fault that this fuzz is for: uses of a derived kernel in two layouts, taken for one."""
    return lambda site: identity(site) if site.view else ((site.leaves, site.weight), ())


def test_it_finds_a_weights_identity_without_its_layout(monkeypatch):
    def sizes(seed):
        return sorted(len(weight) for weight in weights_of(fuzz_programs.generate(seed))[1])

    for seed in EVERYDAY:
        right = sizes(seed)
        with monkeypatch.context() as fault:
            fault.setattr(sites, "_identity", without_layout(sites._identity))
            if sizes(seed) != right and any(f for _, f in fuzz_programs.failures([seed])):
                return
    pytest.fail("no program of every day shows the fault")
