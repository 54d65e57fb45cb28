"""A vote of the training examples for the blocks that train, held once and before training.

Every example is asked at the public initial weights in which blocks its gradient is large. Its vote
for a block is the gradient's norm there over the square root of the block's size: the noise that
training adds to a block has a norm that grows as this root. The row of an example is scaled to
norm 1, so that its size says nothing and costs nothing. `dp.noisy_vote` adds them up.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpjax import dp
from dpjax.build import Run
from dpjax.dp import seeds
from dpjax.models import Params, finetune
from dpjax.runtime import Workdir, hosts

__all__ = ["ballots", "decided"]

_FILE = "vote.json"
_CHUNK = 64  # examples at once, if the config does not say


def decided(run: Run, workdir: Workdir, private_seed: int) -> Run:
    """Returns the run that trains what the vote picks; every host makes the same call.

    Args:
        run: with a vote, which the caller has charged.
        workdir: of the run. The outcome is kept there, and read back when the run is resumed: on
            other devices the sums could be rounded otherwise, and the same noise on other sums
            would be a second release.
        private_seed: of the run.
    """
    if run.vote is None:
        raise ValueError("the run has no vote.")
    names = finetune.block_names(run.model)
    if hosts.first(workdir.exists(_FILE)):
        known = hosts.first(workdir.read(_FILE) if workdir.writes else None)
    else:
        sums = dp.noisy_vote(
            ballots(run),
            mechanism=run.vote.mechanism,
            key=seeds.noise_key(private_seed, "vote"),
        )
        places = sorted(int(place) for place in np.argsort(-sums)[: run.vote.number])
        votes = dict(zip(names, sums.tolist(), strict=True))
        known = hosts.first({"finetune": f"blocks:at:{','.join(map(str, places))}", "votes": votes})
        workdir.write(_FILE, known)
    at = [int(place) for place in known["finetune"].split(":")[-1].split(",")]
    trainable = finetune.blocks(at=at)(run.model).trainable
    last = run.phases[-1].training
    return run._replace(
        phases=tuple(
            phase._replace(trainable=trainable) if phase.training == last else phase
            for phase in run.phases
        )
    )


def ballots(run: Run) -> np.ndarray:
    """Returns the vote of every training example, float64 `[examples, blocks]`, of norm 1 or 0.

    The row of an example depends on that example, the initial weights and public keys alone.
    """
    names = finetune.block_names(run.model)
    trainable, frozen = finetune.split(_with_a_head(run), lambda path: path.split("/")[0] in names)
    in_tree = sorted(trainable)  # the order in which `by_prefix` numbers the groups
    roots = np.array([math.sqrt(finetune.count(trainable[name])) for name in in_tree])
    key = seeds.public_key(run.config.seed, "vote")
    rule = dp.per_layer(1.0, grouping=dp.by_prefix(1))

    @jax.jit
    def norms(trainable: Params, frozen: Params, batch: dict[str, Any]) -> jax.Array:
        mask = batch.pop("mask")
        # Of the example's content, as in training: not of its place in the data.
        batch["key"] = jax.vmap(jax.random.fold_in, (None, 0))(key, batch.pop("identity"))

        def loss(params: Params, example: dict[str, jax.Array]) -> jax.Array:
            return run.loss_fn(finetune.join(params, frozen), example)

        clip = dp.clipped_sum(
            loss, rule, method=run.config.dp.method, microbatch_size=run.config.microbatch
        )
        return clip(trainable, batch, mask)[1].norms

    given = run.config.physical_batch
    size = _CHUNK if given == "auto" else given
    rows = []
    for chunk in dp.chunks(np.arange(len(run.train)), min(size, len(run.train))):
        batch = {**run.train.batch(chunk, seed=0, step=0), "mask": chunk >= 0}
        rows.append(np.asarray(norms(trainable, frozen, batch), np.float64)[chunk >= 0])
    votes = np.concatenate(rows) / roots
    lengths = np.linalg.norm(votes, axis=1, keepdims=True)
    votes = votes / np.where(lengths > 0, lengths, 1.0)
    return votes[:, [in_tree.index(name) for name in names]]


def _with_a_head(run: Run) -> Params:
    """The initial parameters; a head of zeros, which no gradient passes, becomes a random one."""
    head = run.params[run.model.head]
    if any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(head)):
        return run.params
    key = seeds.public_key(run.config.seed, "vote head")
    drawn = {
        name: jax.random.normal(jax.random.fold_in(key, number), leaf.shape, leaf.dtype)
        / math.sqrt(leaf.shape[0])
        if leaf.ndim > 1
        else leaf
        for number, (name, leaf) in enumerate(sorted(head.items()))
    }
    return {**run.params, run.model.head: drawn}
