"""The operator with the tokens of every sample spread over devices.

Tokens meet only in encode. A device that encodes its own tokens holds z_r and lse_r; those of all
devices merge into what one device would have computed,

    lse = log sum_r exp(lse_r),    z = sum_r exp(lse_r - lse) z_r,

so the forward pass sends one message, an all-gather of [B, M, H, D + 1] numbers, and the backward
pass another, of the partial dz [B, M, H, D]. Neither depends on N. Everything else stays on its
device: with the merged z and lse the implementations' gradients of a part of the tokens are that
part of the gradients. A gather and a merge in a fixed order rather than a maximum and a sum over
the network: one wait instead of two, and the same bits on every device and in every run.

A device whose tokens are all masked has z_r = 0, lse_r = -inf and weighs nothing.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, reshard
from jaxtyping import Array, Bool, Float

from flare_jax.ops import flare
from flare_jax.ops.reference import merge_parts


def flare_attention_sharded(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    mesh: Mesh,
    batch: str | None = None,
    tokens: str = "tokens",
    mask: Bool[Array, "B N"] | None = None,
    scale: float = 1.0,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H D"]:
    """`flare_attention` of whole arrays, computed by all devices of `mesh`; use it under `jit`.

    Samples lie over the mesh axis `batch` (None: every device has all of them) and points over the
    axis `tokens`. If that axis does not divide N, the last points are padded and masked (and where
    the mesh's axes are explicit, y lies over `batch` alone). Other arguments as in
    `flare_attention`.

    Raises:
        ValueError: the mesh has no such axis, or its size does not divide the batch.
        and what `flare_attention` raises.
    """
    flare.check(q, k, mask, scale, v=v)
    for axis in (tokens, *([] if batch is None else [batch])):
        if axis not in mesh.shape:
            raise ValueError(f"mesh must have an axis {axis!r}, its axes are {dict(mesh.shape)}")
    if batch is not None and k.shape[0] % mesh.shape[batch]:
        raise ValueError(
            f"axis {batch!r} of the mesh must divide the batch of {k.shape[0]}, it has "
            f"{mesh.shape[batch]} devices: at most {math.gcd(k.shape[0], mesh.shape[batch])} fit"
        )
    n = k.shape[1]
    spare = -n % mesh.shape[tokens]
    if spare:
        mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
        k, v, mask = (
            jnp.pad(x, ((0, 0), (0, spare)) + ((0, 0),) * (x.ndim - 2)) for x in (k, v, mask)
        )
    local = functools.partial(
        flare_attention_shard, axis_name=tokens, scale=scale, implementation=implementation
    )
    whole_array, spec = PartitionSpec(), PartitionSpec(batch, tokens)
    explicit = AxisType.Explicit in mesh.axis_types  # types of arrays name their shardings
    put = lambda x, spec: None if x is None else reshard(x, NamedSharding(mesh, spec))
    if explicit:
        q, (k, v, mask) = put(q, whole_array), (put(x, spec) for x in (k, v, mask))
    y = jax.shard_map(
        lambda q, k, v, mask: local(q, k, v, mask=mask),
        mesh=mesh,
        in_specs=(whole_array, spec, spec, spec),
        out_specs=spec,
        check_vma=False,  # Pallas calls do not state over which axes their results vary
    )(q, k, v, mask)
    if explicit and spare:  # no type can name the sharding of what is left
        y = put(y, PartitionSpec(batch))
    return y[:, :n]


def flare_attention_shard(
    q: Float[Array, "M H D"],
    k: Float[Array, "B N H D"],
    v: Float[Array, "B N H D"],
    *,
    axis_name: str,
    mask: Bool[Array, "B N"] | None = None,
    scale: float = 1.0,
    implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B N H D"]:
    """`flare_attention` of one device's tokens with those of all devices along `axis_name`.

    For use inside `jax.shard_map(..., check_vma=False)`, N being the tokens of this device.

    The gradient of q that a device computes is the part of its own tokens, as that of any other
    replicated parameter of a model whose tokens are spread: sum it over the devices.
    """
    flare.check(q, k, mask, scale, v=v)
    ops = flare.pick(implementation, q, k, v, mask)
    return _attention(ops, float(scale), axis_name, q, k, v, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(ops, scale, axis_name, q, k, v, mask):
    return _attention_fwd(ops, scale, axis_name, q, k, v, mask)[0]


def _attention_fwd(ops, scale, axis_name, q, k, v, mask):
    merge = lambda z, lse: flare.keep(*merged(z, lse, axis_name=axis_name))
    if hasattr(ops, "attention_fwd"):
        return ops.attention_fwd(q, k, v, mask, scale, merge)
    z, lse = merge(*ops.encode(q, k, v, mask, scale))
    return ops.decode(q, k, z, mask, scale), (q, k, v, mask, z, lse)


def _attention_bwd(ops, scale, axis_name, residuals, dy):
    q, k, v, mask, z, lse = residuals[:6]
    if hasattr(ops, "attention_bwd"):
        gradients = ops.attention_bwd(scale, residuals, dy, _gather_over(axis_name))
    else:
        dq_decode, dk_decode, dz = ops.decode_vjp(q, k, z, mask, scale, dy)
        dz = lax.psum(dz, axis_name)
        dq, dk, dv = ops.encode_vjp(q, k, v, mask, scale, z, lse, dz)
        gradients = dq + dq_decode, dk + dk_decode, dv
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None


@functools.cache  # one function for each axis: what is traced with it is traced once
def _gather_over(axis_name):
    return functools.partial(gathered, axis_name=axis_name)


_attention.defvjp(_attention_fwd, _attention_bwd)


def merged(
    z: Float[Array, "B M H D"], lse: Float[Array, "B M H"], *, axis_name: str
) -> tuple[Float[Array, "B M H D"], Float[Array, "B M H"]]:
    """z and lse of the tokens of all devices, from those of each device's own tokens."""
    parts = lax.all_gather(jnp.concatenate([z, lse[..., None].astype(z.dtype)], -1), axis_name)
    return merge_parts(parts[..., :-1], parts[..., -1])


def gathered(*parts: Float[Array, "B ..."], axis_name: str) -> tuple[Float[Array, "B R ..."], ...]:
    """Each array of every device along a new second axis, all in one message."""
    flat = jnp.concatenate([x.reshape(x.shape[0], -1) for x in parts], axis=1)
    flat = lax.all_gather(flat, axis_name, axis=1)  # [B, R, all sizes]
    ends = [sum(math.prod(x.shape[1:]) for x in parts[: i + 1]) for i in range(len(parts))]
    pieces = jnp.split(flat, ends[:-1], axis=2)
    return tuple(
        piece.reshape(*flat.shape[:2], *x.shape[1:]) for piece, x in zip(pieces, parts, strict=True)
    )


# Two reductions after which every device goes on with the same numbers, as a loss does. Their
# gradients are local: the transpose of a psum inside shard_map is another psum, which would count
# the one loss once a device.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def total(x: Float[Array, "..."], axis_name: str) -> Float[Array, "..."]:
    """The sum over devices, where every device then computes the same from it."""
    return lax.psum(x, axis_name)


total.defvjp(lambda x, axis_name: (lax.psum(x, axis_name), None), lambda _, __, dx: (dx,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def whole(x: Float[Array, "B N ..."], axis_name: str) -> Float[Array, "B N*R ..."]:
    """All devices' tokens in order, where every device then computes the same from them."""
    return lax.all_gather(x, axis_name, axis=1, tiled=True)


def _whole_bwd(axis_name, _, dx):
    size = dx.shape[1] // lax.axis_size(axis_name)
    return (lax.dynamic_slice_in_dim(dx, lax.axis_index(axis_name) * size, size, axis=1),)


whole.defvjp(lambda x, axis_name: (whole(x, axis_name), None), _whole_bwd)
