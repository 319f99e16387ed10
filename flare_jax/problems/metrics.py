"""Errors of predicted fields: pure functions `(prediction, target, mask) -> [B]`."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flare_jax.ops.sharded import total

AnyArray = Array | np.ndarray  # NumPy on the host, jax on the device


def rel_l2(
    prediction: Float[AnyArray, "B N O"],
    target: Float[AnyArray, "B N O"],
    mask: Bool[AnyArray, "B N"] | None = None,
    *,
    units: Float[np.ndarray, "O"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "B"]:
    """Relative L2 error of each sample, over its real points and all its fields.

        e_b = ||prediction_b - target_b|| / ||target_b||

    Fields are physical (decoded); with `units` they are divided by these first, so that a field of
    small numbers counts beside one of large numbers. Points where `mask` is False count neither in
    the value nor in the gradient, whatever they hold. Sums are taken in float32 at least. The
    gradient is finite everywhere, zero where prediction and target agree; a target that is zero at
    every real point (a sample that is all padding, for one) gives the absolute error,
    ||prediction_b||.

    With the points of each sample spread over the devices along `axis_name` of a `jax.shard_map`,
    every device gets the error over all points, and the gradient at its own.
    """
    if prediction.shape != target.shape or prediction.ndim != 3:
        raise ValueError(
            "rel_l2 compares two arrays [B, N, O], got prediction "
            f"{list(prediction.shape)} and target {list(target.shape)}"
        )
    dtype = jnp.promote_types(jnp.promote_types(prediction.dtype, target.dtype), jnp.float32)
    prediction, target = prediction.astype(dtype), target.astype(dtype)
    if mask is not None:
        if mask.shape != target.shape[:2]:
            raise ValueError(f"mask is {list(mask.shape)}, fields are {list(target.shape)}")
        prediction = jnp.where(mask[..., None], prediction, 0)
        target = jnp.where(mask[..., None], target, 0)
    if units is not None:
        prediction, target = prediction / units[None, None], target / units[None, None]
    scale = _norm(target, axis_name)
    return _norm(prediction - target, axis_name) / jnp.where(scale > 0, scale, 1)


def rel_l2_on_host(
    prediction: Float[np.ndarray, "B N O"],
    target: Float[np.ndarray, "B N O"],
    mask: Bool[np.ndarray, "B N"] | None = None,
    units: Float[np.ndarray, "O"] | None = None,
) -> Float[np.ndarray, "B"]:
    """`rel_l2` of NumPy arrays, a sample at a time and without the device: for whole splits."""
    errors = []
    for i, (p, y) in enumerate(zip(prediction, target, strict=True)):
        real = slice(None) if mask is None else mask[i]
        p, y = (a[real] / (1 if units is None else units) for a in (p, y))
        scale = np.linalg.norm(y)
        errors.append(np.linalg.norm(p - y) / (scale if scale > 0 else 1))
    return np.array(errors, np.float32)


def rel_l2_of(
    prediction: Float[AnyArray, "B N O"],
    target: Float[AnyArray, "B N O"],
    mask: Bool[AnyArray, "B N"] | None = None,
    *,
    columns: slice,
    axis_name: str | None = None,
) -> Float[Array, "B"]:
    """`rel_l2` of some of the fields."""
    cut = prediction[..., columns], target[..., columns]
    return rel_l2(*cut, mask, axis_name=axis_name)


def _norm(x: Float[AnyArray, "B N O"], axis_name: str | None) -> Float[Array, "B"]:
    """L2 norm of each sample; its gradient at zero is zero rather than NaN."""
    square = jnp.sum(x * x, axis=(1, 2))
    square = square if axis_name is None else total(square, axis_name)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))
