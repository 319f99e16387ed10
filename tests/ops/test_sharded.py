"""The operator over several devices equals the operator on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from jax.sharding import PartitionSpec as P

from flare_jax.ops.flare import flare_attention
from flare_jax.ops.fused import attention_backward, tiles
from flare_jax.ops.sharded import (
    flare_attention_shard,
    flare_attention_sharded,
    merge_parts,
    total,
    whole,
)

NAMES = ("y", "dq", "dk", "dv")
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2}
# name: (B, N, M, H, D, kind of mask, scale of the scores)
CASES = {
    "plain": (2, 40, 8, 2, 8, None, 1.0),
    "uneven": (2, 37, 16, 4, 4, "random", 1.0),
    "empty_shards": (2, 5, 8, 2, 8, None, 1.0),  # 5 points on 4 devices: 2, 2, 1, 0
    "all_masked": (2, 24, 8, 1, 16, "first", 1.0),
    "large_scores": (2, 32, 8, 2, 8, None, 5.0),
}


def mesh_of(data, tokens):
    auto = (jax.sharding.AxisType.Auto,) * 2
    devices = jax.devices()[: data * tokens]
    return jax.make_mesh((data, tokens), ("data", "tokens"), auto, devices=devices)


@pytest.fixture(autouse=True)
def interpret(request, monkeypatch):
    """Lets the kernels run on a CPU where a test asks for them, several splits of few tokens."""
    params = getattr(request.node, "callspec", None)
    if params and params.params.get("implementation") == "fused":
        if jax.default_backend() != "gpu":
            monkeypatch.setenv("FLARE_JAX_INTERPRET", "1")
        monkeypatch.setattr(tiles, "multiprocessors", lambda: 2)
        if params.params.get("case") == "large_scores":  # both exponentials, on every device
            monkeypatch.setattr(attention_backward, "SPREAD", 5.0)


@pytest.mark.parametrize("n", [12, 13])
def test_a_mesh_as_jax_makes_it_will_do(n):
    mesh = jax.make_mesh((2, 2), ("data", "tokens"), devices=jax.devices()[:4])  # explicit axes
    q, k = jnp.ones((4, 2, 4)), jax.random.normal(jax.random.key(0), (2, n, 2, 4))
    y = jax.jit(functools.partial(flare_attention_sharded, mesh=mesh, batch="data"))(q, k, k)
    assert relative(y, flare_attention(q, k, k)) <= 1e-6


def inputs(case, dtype=np.float32):
    """q, k, v, dy and mask; masked tokens hold NaN."""
    b, n, m, h, d, kind, size = CASES[case]
    rng = np.random.default_rng(0)
    shapes = (m, h, d), (b, n, h, d), (b, n, h, d), (b, n, h, d)
    q, k, v, dy = (jnp.asarray(size**0.5 * rng.standard_normal(s), dtype) for s in shapes)
    if kind is None:
        return q, k, v, dy, None
    mask = rng.random((b, n)) < 0.6 if kind == "random" else np.zeros((b, n), bool)
    mask[0, :3] = True  # with "first", the second sample has no real token anywhere
    k, v, dy = (jnp.where(mask[:, :, None, None], x, jnp.nan) for x in (k, v, dy))
    return q, k, v, dy, jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames=("f",))
def value_and_gradients(f, q, k, v, dy, mask):
    y, pullback = jax.vjp(lambda q, k, v: f(q, k, v, mask=mask), q, k, v)
    return y, *pullback(dy)


CHECKS = [(case, "float32", name) for case in CASES for name in ("xla", "fused")]
CHECKS += [("uneven", "float32", "reference")]
CHECKS += [("uneven", "bfloat16", name) for name in ("xla", "fused")]
CHECKS += [pytest.param("uneven", "bfloat16", "cudnn", marks=pytest.mark.gpu)]


@functools.cache
def oracle(case, dtype):
    """float64 value and gradients of the rounded inputs on one device."""
    q, k, v, dy, mask = inputs(case, dtype)
    with jax.enable_x64(True):
        f = functools.partial(flare_attention, implementation="reference", scale=0.7)
        q, k, v, dy = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, dy))
        return [np.asarray(x) for x in value_and_gradients(f, q, k, v, dy, mask)]


@pytest.mark.parametrize("case, dtype, implementation", CHECKS)
def test_values_and_gradients_are_those_of_one_device(case, dtype, implementation):
    q, k, v, dy, mask = inputs(case, dtype)
    many = functools.partial(
        flare_attention_sharded,
        mesh=mesh_of(2, 4),
        batch="data",
        scale=0.7,
        implementation=implementation,
    )
    found = value_and_gradients(many, q, k, v, dy, mask)
    for name, x, want in zip(NAMES, found, oracle(case, dtype), strict=True):
        assert x.dtype == dtype and x.shape == want.shape
        assert relative(x, want) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("implementation", ["xla", "fused"])
def test_one_small_message_each_way(implementation):
    n, (b, m, h, d) = 4096, (2, 8, 2, 8)
    spread = functools.partial(
        flare_attention_shard, axis_name="tokens", implementation=implementation
    )
    spec = P("data", "tokens")

    def gradients(q, k, v, dy):
        y, pullback = jax.vjp(spread, q, k, v)
        return y, *pullback(dy)

    f = jax.shard_map(
        gradients,
        mesh=mesh_of(2, 4),
        in_specs=(P(), spec, spec, spec),
        out_specs=(spec, P(("data", "tokens")), spec, spec),
        check_vma=False,
    )
    q, k = jnp.ones((m, h, d)), jnp.ones((b, n, h, d))
    if implementation == "fused":  # interpreted kernels hold no collectives; do not compile them
        text = jax.jit(f).lower(q, k, k, k).as_text()
        messages = re.findall(r'"stablehlo\.(all_\w+|reduce_scatter|collective_\w+)"', text)
        sizes = re.findall(r"stablehlo\.all_gather.*->\s*tensor<([\dx]+)xf32>", text)
        assert messages == ["all_gather", "all_gather"]
        largest = 4 * (b // 2) * m * h * (d + 2)
        assert all(np.prod([int(s) for s in x.split("x")]) <= largest for x in sizes) and sizes
        return
    text = jax.jit(f).lower(q, k, k, k).compile().as_text()
    moved = re.findall(r"= (\S+?)(?:\{\S*)? (all-\w+|reduce-scatter|collective\S*)\(", text)
    assert sorted(kind for _, kind in moved) == ["all-gather", "all-reduce"]
    for shape, _ in moved:
        sizes = [int(s) for s in re.search(r"\[([\d,]+)\]", shape)[1].split(",")]
        assert n not in sizes and n // 4 not in sizes and np.prod(sizes) <= 4 * m * h * (d + 1)


def test_whole_arrays_lose_no_sharding_to_a_gather_of_tokens():
    k = jnp.ones((2, 4096, 2, 8))
    f = functools.partial(flare_attention_sharded, mesh=mesh_of(2, 4), batch="data")
    text = value_and_gradients.lower(f, k[0, :8], k, k, k, None).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-(?:gather|to-all)\(", text)
    assert gathered  # of latents' statistics
    for shape in gathered:
        assert "4096" not in shape and "1024" not in shape, shape


def test_merging_parts_without_tokens_stays_finite():
    rng = np.random.default_rng(0)
    z, lse = rng.standard_normal((3, 1, 2, 1, 4)), rng.standard_normal((3, 1, 2, 1))
    z, lse = jnp.asarray(z, jnp.float32), jnp.asarray(lse, jnp.float32)
    empty = jnp.full_like(lse, -jnp.inf)
    all_z, all_lse = merge_parts(z, lse.at[1].set(-jnp.inf))
    want_z, want_lse = merge_parts(z[::2], lse[::2])
    np.testing.assert_allclose(all_z, want_z, rtol=1e-6)
    np.testing.assert_allclose(all_lse, want_lse, rtol=1e-6)
    zero, low = merge_parts(jnp.zeros_like(z), empty)
    assert not zero.any() and np.all(low == -np.inf)


@pytest.mark.parametrize("reduce", [total, whole])
def test_reductions_count_a_shared_loss_once(reduce):
    x = jnp.arange(8.0).reshape(1, 8) / 8

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(reduce(x, "tokens"))))(x)

    spec = P(None, "tokens")
    f = jax.shard_map(gradient, mesh=mesh_of(1, 4), in_specs=spec, out_specs=spec, check_vma=False)
    parts = x.reshape(1, 4, 2)
    whole_sum = jnp.cos(parts.sum(1, keepdims=True))
    want = jnp.broadcast_to(whole_sum, parts.shape).reshape(1, 8) if reduce is total else jnp.cos(x)
    np.testing.assert_allclose(jax.jit(f)(x), want, rtol=1e-6)


def test_two_runs_give_the_same_bits():
    f = functools.partial(flare_attention_sharded, mesh=mesh_of(1, 8), implementation="xla")
    arguments = inputs("plain", "bfloat16")
    for x, y in zip(*(value_and_gradients(f, *arguments) for _ in range(2)), strict=True):
        assert np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def test_a_mesh_that_does_not_fit_says_what_would():
    q, k, v, _, _ = inputs("plain")
    with pytest.raises(ValueError, match="batch of 2, it has 8 devices: at most 2 fit"):
        flare_attention_sharded(q, k, v, mesh=mesh_of(8, 1), batch="data")
    with pytest.raises(ValueError, match="mesh must have an axis 'points'"):
        flare_attention_sharded(q, k, v, mesh=mesh_of(1, 8), tokens="points")
    with pytest.raises(ValueError, match="v must be"):
        flare_attention_sharded(q, k, v[:, 1:], mesh=mesh_of(1, 8))
