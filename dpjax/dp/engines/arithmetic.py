"""The engine's products of float32 numbers, on each kind of device, and what they may be off by.

A CPU multiplies in float32. On a GPU that is several times slower than its tensor cores, which
take bfloat16 or TF32 numbers, and a TPU has nothing else: it makes six bfloat16 products of one of
`Precision.HIGHEST`. There, `dot` cuts each operand in two bfloat16 parts and makes three products,
in the time of one and a half TF32 products, as the plain gradient has them.

**What is lost.** Let u = 2^-24, the unit roundoff of float32, and x a float32 number.

- *The parts.* `halves` rounds x to the nearest h of 8 bits and then l to that of x - h, which
  float32 holds exactly. With 2^e <= |x| < 2^(e+1), |x - h| <= 2^(e-8). If that is an equality, l is
  x - h; else x - h is below 2^(e-8), where numbers of 8 bits are 2^(e-16) apart. So |l| <= 2^-8 |x|
  and |x - h - l| <= 2^-17 |x|. The product of two numbers is computed as h h' + h l' + l h'. That
  leaves out l l' and what comes of the two remainders: at most 2^-16 + 2 * 2^-17 + 2^-34 times
  |x||x'|, less than 513 u |x||x'|.
- *The sum.* Products of bfloat16 numbers are exact in float32. Tensor cores add k >= 8 of them
  (4 of TF32) to a float32 number at a time; the addends are aligned to the largest and cut off,
  and so is the result (Fasi et al. 2021, doi 10.7717/peerj-cs.330). Without any extra bits each
  addend and the result lose 2 u of a number that the sum of absolute values bounds: that is
  2 u (k + 2) / k <= 2.5 u for each product. The two small products add 2^-7 of that, their
  addition to the large one 2 u. All in all, a sum of K products is off by at most (3 K + 516) u
  times the sum of their absolute values, and by 3 K u if the operands are bfloat16 from the start
  (`roundings`). NVIDIA does not document how it adds, nor Google how a TPU does: 3 u is the worst
  that has been measured on GPUs, and taken for all.
- *Small numbers.* A part below 2^-126 may be lost, which changes a product by at most 2^-126 |x'|,
  and a sum of K products by 2^-126 sqrt(K) (a + b), with a and b the norms of the operands. Bounds
  of the form (c u a^2 + K 2^-126)^(1/2) (c u b^2 + K 2^-126)^(1/2), such as `products` has, are at
  least (c u K 2^-126 (a^2 + b^2) / 2)^(1/2) > 2^-76 sqrt(K) (a + b), and hold that many times over.
- *Large numbers.* Above 3.39e38, 0.4% below the end of float32, h is infinite. The engine forms
  the gradient of such an example by itself, finds that it is not finite, and leaves it out.

**Why not `jax.lax.DotAlgorithmPreset`.** BF16_BF16_F32_X3 cuts off where `halves` rounds, and so
loses three times as much. TF32_TF32_F32_X3 takes twice the time, is for NVIDIA's devices alone, and
what becomes of it depends on XLA's version. Of BF16_BF16_F32_X6, XLA multiplies in bfloat16 alone
where it takes a product of a matrix and a vector for a sum (`dot_algorithm_rewriter.cc`). What is
written out here is the same program on all devices, so that a CPU can test it.

**What stays at `Precision.HIGHEST`** everywhere: sums of gradients that are in memory
(`summation.weigh`), which are as fast as memory is, and would need a copy of it for the parts; sums
of convolutions' gradients (`forms.conv_sum`), because cuDNN has no convolution of bfloat16 numbers
whose result is float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Contract", "backend", "dot", "full_dot", "halves", "root", "roundings"]

Contract = tuple[tuple[int, ...], tuple[int, ...]]

_PER_PRODUCT, _OF_PARTS = 3, 516  # units, see the module


def backend() -> str:
    """The platform that JAX computes on, `jax.default_device` included.

    Of arrays that are elsewhere, `dot` is computed as for that platform, with its bounds: they hold
    on a CPU too, and what is asked for on a CPU is float32 arithmetic on every platform but a TPU.
    """
    device = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else str(device.platform)


def roundings(terms: Any, *operands: jax.Array) -> Any:
    """How many units roundoff a sum of `terms` products by `dot` may be off by.

    Args:
        terms: a number, or an array of such.
        operands: both, or none for any.

    Returns:
        Units of 2^-24 times the sum of the products' absolute values.
    """
    if backend() == "cpu":
        return terms
    exact = bool(operands) and all(x.dtype == jnp.bfloat16 for x in operands)
    return _PER_PRODUCT * terms + (0 if exact else _OF_PARTS)


def dot(a: jax.Array, b: jax.Array, contract: Contract, batch: int) -> jax.Array:
    """Contracts axes of `a` with axes of `b`, with `batch` common leading axes, in float32.

    Guarantees:
        Off by at most `roundings` of the number of products; see the module.
    """
    if a.dtype == b.dtype == jnp.bfloat16:
        return _dot(a, b, contract, batch, None)
    if backend() == "cpu":
        return full_dot(a, b, contract, batch)
    (a, *a_low), (b, *b_low) = _parts(a), _parts(b)
    pairs = [(low, b) for low in a_low] + [(a, low) for low in b_low] + [(a, b)]
    # The small ones first: they round less.
    products = [_dot(*pair, contract, batch, None) for pair in pairs]
    return functools.reduce(jnp.add, products)


def full_dot(a: jax.Array, b: jax.Array, contract: Contract, batch: int) -> jax.Array:
    """`dot` of float32 numbers, on every device: one product, at the device's full precision."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return _dot(a, b, contract, batch, jax.lax.Precision.HIGHEST)


def _dot(
    a: jax.Array, b: jax.Array, contract: Contract, batch: int, precision: jax.lax.Precision | None
) -> jax.Array:
    axes = tuple(range(batch))
    return jax.lax.dot_general(
        a,
        b,
        (contract, (axes, axes)),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def halves(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two bfloat16 arrays that add up to a float32 one but for 2^-17 of each number."""
    # XLA may take a conversion to bfloat16 and back for nothing, and does so on GPUs: the second
    # part would be zero. It leaves `reduce_precision` alone.
    high = jax.lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (array - high).astype(jnp.bfloat16)


def _parts(array: jax.Array) -> tuple[jax.Array, ...]:
    return (array,) if array.dtype == jnp.bfloat16 else halves(array.astype(jnp.float32))


@jax.custom_jvp
def root(square: jax.Array) -> jax.Array:
    """The square root, whose derivatives are 0 where it is 0.

    A norm has no derivative there and `jnp.sqrt` an infinite one, which makes NaN of the derivative
    of whatever the norm was to bound.
    """
    return jnp.sqrt(square)


@root.defjvp
def _root_derivative(squares: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    norm = root(squares[0])  # whose own derivative is that of the second order
    some = norm != 0
    return norm, jnp.where(some, tangents[0] / (2 * jnp.where(some, norm, 1.0)), 0.0)
