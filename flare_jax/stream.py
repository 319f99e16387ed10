"""A FLARE model on more points than the device holds: a chunk of them at a time.

Only the mixing looks at other points, and of them only at z and lse, whose parts merge. So a block
takes two passes over the chunks of x [N, C], which stays on the host in between:

    z, lse = merge of encode(x_chunk)      over all chunks
    x_chunk = decode(x_chunk, z)           for each chunk

The device holds a chunk or two of a block's activations and one block's z, whatever N is. The
result is that of the whole mesh at once, to rounding.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from flare_jax.models.flare import FLAREBlock, FLAREConfig, FLAREModel
from flare_jax.models.functional import Params, functional
from flare_jax.ops.reference import merge_parts

AHEAD = 2  # chunks that are sent while others are encoded


def make_streamed(
    config: FLAREConfig, in_dim: int, out_dim: int, chunk: int, dtype=jnp.float32
) -> Callable:
    """`apply(params, x, mask)` like that of the model, for one sample of any number of points.

    x [1, N, in] and mask [1, N] (or None) are NumPy arrays, and so is the result [1, N, O];
    `chunk` points are on the device at a time.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 point, got {chunk}")
    shape_of = lambda cls, *widths: nnx.eval_shape(
        lambda: cls(config, *widths, dtype=dtype, rngs=nnx.Rngs(0))
    )
    model, block = shape_of(FLAREModel, in_dim, out_dim), shape_of(FLAREBlock)
    part = lambda module, method=None: functional(module, method)[0]
    in_proj, out_proj = part(model.in_proj), jax.jit(part(model.out_proj))
    encode, decode = part(block, FLAREBlock.encode), jax.jit(part(block, FLAREBlock.decode))

    @jax.jit
    def first(params, x, mask):
        return in_proj(params, jnp.where(mask[:, :, None], x, 0))

    @functools.partial(jax.jit, donate_argnums=(3, 4))
    def gather(params, x, mask, z, lse):
        parts = zip((z, lse), encode(params, x, mask), strict=True)
        return merge_parts(*(jnp.stack(pair) for pair in parts))

    def apply(
        params: Params, x: Float[np.ndarray, "1 N I"], mask: Bool[np.ndarray, "1 N"] | None = None
    ) -> Float[np.ndarray, "1 N O"]:
        n, m, h = x.shape[1], config.num_latents, config.heads
        mask = np.ones((1, n), bool) if mask is None else np.asarray(mask)
        starts = range(0, n, chunk)

        def cut(array, start):  # every chunk has one shape: one program each
            piece = array[:, start : start + chunk]
            spare = min(chunk, n) - piece.shape[1]
            return np.pad(piece, ((0, 0), (0, spare)) + ((0, 0),) * (piece.ndim - 2))

        def fill(out, f):
            for start in starts:
                out[:, start : start + chunk] = np.asarray(f(start))[:, : n - start]
            return out

        c = config.channel_dim
        hidden = np.empty((1, n, c), dtype)
        fill(hidden, lambda i: first(params["in_proj"], cut(x, i), cut(mask, i)))
        for own in _blocks(params, config):
            z = jnp.zeros((1, m, h, c // h)), jnp.full((1, m, h), -jnp.inf)
            for number, i in enumerate(starts, 1):
                z = gather(own, cut(hidden, i), cut(mask, i), *z)
                if number % AHEAD == 0:  # else all chunks are sent before the first is done
                    jax.block_until_ready(z)
            fill(hidden, lambda i, own=own, z=z: decode(own, cut(hidden, i), z[0], cut(mask, i)))
        fields = np.empty((1, n, out_dim), np.float32)
        return fill(fields, lambda i: out_proj(params["out_proj"], cut(hidden, i)))

    return apply


def _blocks(params: Params, config: FLAREConfig):
    """Parameters of each block in turn, on the device."""
    for i in range(config.num_blocks):
        stacked = config.scan_blocks
        own = params["blocks"] if stacked else params["blocks"][str(i)]
        yield jax.device_put(jax.tree.map(lambda a, i=i: a[i], own) if stacked else own)
