"""The operator's GPU kernels in interpret mode, and their lowering for CUDA without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative

from flare_jax import flare_attention, flare_decode
from flare_jax.ops import reference
from flare_jax.ops.fused import attention, attention_backward, mlp_kernels, tiles
from flare_jax.ops.fused import math as fused_math

NAMES = ("y", "dq", "dk", "dv")
TOLERANCE = {"float32": 5e-6, "bfloat16": 2e-2, "float16": 3e-3}
# (B, N, M, H, D, masked, dtype, scale)
CASES = {
    "two_heads_a_group": (1, 100, 20, 2, 8, False, "float32", 0.7),
    "masked_bfloat16": (3, 70, 16, 2, 16, True, "bfloat16", 1.0),
    "four_heads_a_group": (1, 64, 8, 4, 4, False, "bfloat16", 1.0),
    "odd_heads": (2, 41, 5, 3, 16, True, "float32", 0.5),
    "float16": (1, 50, 16, 1, 32, False, "float16", 0.3),
    "wide_heads": (1, 40, 8, 1, 64, True, "float32", 0.2),
    "many_latents": (1, 40, 300, 1, 16, True, "float32", 0.7),
    "one_token": (2, 1, 8, 2, 8, False, "float32", 0.7),
    "one_latent": (1, 33, 1, 2, 8, False, "float32", 0.7),
    "spread": (1, 80, 24, 2, 8, True, "float32", 30.0),  # scores over hundreds of nats
    "spread_many_latents": (1, 30, 270, 1, 16, False, "float32", 25.0),
}


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    """Kernels in interpret mode, cut into several small splits."""
    monkeypatch.setenv("FLARE_JAX_INTERPRET", "1")
    monkeypatch.setattr(tiles, "multiprocessors", lambda: 2)
    small = lambda t: tiles.dataclasses.replace(t, tokens=32, latents=min(t.latents, 128), waves=1)
    monkeypatch.setattr(tiles, "TABLE", {key: small(t) for key, t in tiles.TABLE.items()})


def inputs(case, seed=0):
    """q, k, v, dy, mask, scale. Masked tokens hold NaN; the last of several samples is padding."""
    b, n, m, h, d, masked, dtype, scale = CASES[case]
    rng = np.random.default_rng(seed)
    shapes = (m, h, d), (b, n, h, d), (b, n, h, d), (b, n, h, d)
    arrays = [rng.standard_normal(s) for s in shapes]
    mask = rng.random((b, n)) < 0.6 if masked else None
    if masked:
        mask[-1] = b == 1 and mask[-1]
        for x in arrays[1:]:
            x[~mask] = np.nan
        mask = jnp.asarray(mask)
    return *(jnp.asarray(x, dtype) for x in arrays), mask, scale


@functools.partial(jax.jit, static_argnames="scale")
def fused(q, k, v, dy, mask, scale):
    y, residuals = attention.attention_fwd(q, k, v, mask, scale)
    return y, *attention.attention_bwd(scale, residuals, dy)


@functools.partial(jax.jit, static_argnames="scale")
def halves(q, k, v, dy, mask, scale):
    z, lse = attention.encode(q, k, v, mask, scale)
    dq, dk, dz = attention.decode_vjp(q, k, z, mask, scale, dy)
    more_dq, more_dk, dv = attention.encode_vjp(q, k, v, mask, scale, z, lse, dz)
    y = attention.decode(q, k, z, mask, scale)
    return y, dq + more_dq, dk.astype(jnp.float32) + more_dk.astype(jnp.float32), dv


@functools.cache
def oracle(case):
    """float64 values and gradients of the rounded inputs from the dense equations."""
    q, k, v, dy, mask, scale = inputs(case)
    with jax.enable_x64(True):
        q, k, v, dy = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, dy))

        def f(q, k, v):
            z, _ = reference.encode(q, k, v, mask, scale)
            return reference.decode(q, k, z, mask, scale)

        @jax.jit
        def exact(q, k, v, dy):
            y, pullback = jax.vjp(f, q, k, v)
            return y, *pullback(dy if mask is None else jnp.where(mask[:, :, None, None], dy, 0))

        return tuple(np.asarray(x) for x in exact(q, k, v, dy))


def assert_close(case, results):
    b, n, *_, masked, dtype, scale = CASES[case]
    dy, mask = inputs(case)[3:5]
    # With one token y = v: dq and dk are sums that cancel to zero, so their error is absolute.
    floor = float(jnp.linalg.norm(dy)) if n == 1 else 0.0
    # a score of S carries a rounding error of S 2^-24, which exp makes relative
    tolerance = TOLERANCE[dtype] * max(1.0, scale)
    for name, x, want in zip(NAMES, results, oracle(case), strict=True):
        assert relative(x, want, floor) <= tolerance, name
        if masked and name != "dq":
            assert not np.any(np.asarray(x, np.float32)[~np.asarray(mask)]), name


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_match_the_dense_equations(case):
    results = fused(*inputs(case))
    assert all(x.dtype == CASES[case][6] for x in (results[0], *results[2:]))
    assert_close(case, results)


@pytest.mark.parametrize("case", ["masked_bfloat16", "odd_heads", "many_latents", "spread"])
def test_the_two_halves_match_the_dense_equations(case):
    assert_close(case, halves(*inputs(case)))


def test_statistics_and_their_gradients_match_the_dense_equations():
    q, k, v, _, mask, scale = inputs("odd_heads")
    rng = np.random.default_rng(1)
    b, _, m, h, d, *_ = CASES["odd_heads"]
    dz, dlse = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((b, m, h, d), (b, m, h)))

    def statistics(ops):
        @jax.jit
        def run(dz, dlse):
            z, lse = ops.encode(q, k, v, mask, scale)
            return z, lse, *ops.encode_vjp(q, k, v, mask, scale, z, lse, dz, dlse)

        return run(dz, dlse)

    z, lse, *results = statistics(attention)
    want_z, want_lse, *expected = statistics(reference)
    assert relative(z, want_z) <= TOLERANCE["float32"]
    assert np.all(np.isneginf(lse[-1])) and not np.any(z[-1])  # a sample of padding
    np.testing.assert_allclose(lse[:-1], want_lse[:-1], rtol=1e-5)
    for name, x, want in zip(NAMES[1:], results, expected, strict=True):
        assert relative(x, want) <= TOLERANCE["float32"], name


def test_spread_cases_need_the_loop_with_both_exponentials(monkeypatch):
    monkeypatch.setattr(attention_backward, "SPREAD", np.inf)
    monkeypatch.setitem(tiles.TABLE, "of this test", None)  # kernels are traced once for a table
    without_guard = fused.__wrapped__(*inputs("spread"))
    assert not relative(without_guard[2], oracle("spread")[2]) <= 1e-3


def test_vmap_scan_and_remat_change_nothing():
    q, k, v, dy, mask, scale = inputs("odd_heads")

    @jax.custom_vjp
    def f(q, k, v):
        return attention.decode(q, k, attention.encode(q, k, v, mask, scale)[0], mask, scale)

    def backward(residuals, dy):
        dq, dk, dv = attention.attention_bwd(scale, (*residuals[:3], mask, *residuals[3:]), dy)
        return dq.astype(q.dtype), dk, dv

    def forward(q, k, v):
        y, residuals = attention.attention_fwd(q, k, v, mask, scale)
        return y, residuals[:3] + residuals[4:]

    f.defvjp(forward, backward)
    dy = jnp.where(mask[:, :, None, None], dy, 0)
    g = lambda q, k, v: jax.vjp(jax.checkpoint(f), q, k, v)[1](dy)
    stack = lambda x: jnp.stack([x, 2 * x, -x])
    args = stack(q), stack(k), stack(v)
    one_by_one = [jax.jit(g)(*(x[i] for x in args)) for i in range(3)]
    scanned = jax.lax.scan(lambda _, x: (None, g(*x)), None, args)[1]
    for results in (jax.jit(jax.vmap(g))(*args), scanned):
        for x, want in zip(results, zip(*one_by_one, strict=True), strict=True):
            assert relative(x, np.stack(want)) <= 1e-6


@pytest.mark.parametrize("case", ["masked_bfloat16", "many_latents"])
def test_two_runs_give_the_same_bits(case):
    for x, y in zip(fused(*inputs(case)), fused(*inputs(case)), strict=True):
        assert np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32), equal_nan=True)


@pytest.mark.parametrize(("nearest", "loss"), [(False, 2.0**-15), (True, 2.0**-17)])
def test_float32_is_split_into_two_bfloat16(nearest, loss):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 64)), jnp.float32)
    hi, lo = fused_math.split_bf16(x, nearest)
    rest = np.asarray(x) - np.asarray(hi, np.float32) - np.asarray(lo, np.float32)
    assert np.all(np.abs(rest) <= loss * np.abs(x))


def test_default_precision_does_not_reach_the_products_in_kernels(monkeypatch):
    monkeypatch.setenv("FLARE_JAX_INTERPRET", "")
    x, mlp_dots = jnp.ones((16, 16), jnp.bfloat16), mlp_kernels.Dots(jnp.bfloat16, "native", False)

    def traced(precision):
        with jax.default_matmul_precision(precision):
            in_mlp = jax.make_jaxpr(lambda x: mlp_dots.dot((x,), (x,), 1, 0, 0.0))(x)
            return str(jax.make_jaxpr(fused_math.dot)(x, x)), str(in_mlp)

    assert traced("tensorfloat32") == traced("bfloat16") == traced(None)


@pytest.mark.parametrize("f", [flare_attention, flare_decode])
def test_second_derivatives_are_refused_with_what_to_do(f):
    q, k, v, *_ = inputs("two_heads_a_group")
    last = v if f is flare_attention else v[:, : q.shape[0]]

    def gradient(q):
        return jax.grad(lambda q: jnp.sum(f(q, k, last, implementation="fused") ** 2))(q)

    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda q: jnp.sum(gradient(q) ** 2))(q)
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.jvp(gradient, (q,), (q,))


def test_large_float16_gradients_do_not_overflow():
    """dz sums over tokens: past float16's range although every result is within it."""
    n = 512
    q, k = jnp.zeros((1, 1, 16), jnp.float16), jnp.zeros((1, n, 1, 16), jnp.float16)
    v, dy = jnp.ones_like(k), jnp.full_like(k, 1000.0)
    _, _, _, dv = fused(q, k, v, dy, None, 1.0)
    np.testing.assert_allclose(np.asarray(dv, np.float32), 1000.0, rtol=1e-3)


@pytest.mark.parametrize(
    "q, k, message",
    [
        (jnp.zeros((4, 2, 12)), jnp.zeros((1, 8, 2, 12)), "head width"),
        (jnp.zeros((4, 2, 8), int), jnp.zeros((1, 8, 2, 8), int), "dtype"),
        (jnp.zeros((4, 2, 4)), jnp.zeros((1, 8, 2, 4)), "multiple of 4 heads"),
    ],
)
def test_unsupported_arguments_are_refused_with_the_reason(q, k, message):
    with pytest.raises(NotImplementedError, match=message):
        attention.supports(q, k, k, None)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU is supported")
def test_a_cpu_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setenv("FLARE_JAX_INTERPRET", "")
    q, k, v, _, mask, _ = inputs("one_token")
    with pytest.raises(NotImplementedError, match="NVIDIA GPU"):
        attention.supports(q, k, v, mask)


@pytest.mark.filterwarnings("ignore:.*Pallas Triton backend is deprecated")
@pytest.mark.parametrize("m, d, dtype", [(128, 16, "bfloat16"), (512, 8, "float32")])
def test_lowers_for_cuda_without_a_gpu(monkeypatch, m, d, dtype):
    monkeypatch.setenv("FLARE_JAX_INTERPRET", "")
    tokens = jax.ShapeDtypeStruct((2, 1000, 4, d), dtype)
    args = jax.ShapeDtypeStruct((m, 4, d), dtype), tokens, tokens, tokens
    mask = jax.ShapeDtypeStruct((2, 1000), bool)
    run = jax.jit(lambda q, k, v, dy, mask: fused.__wrapped__(q, k, v, dy, mask, 1.0))
    abstract = jax.sharding.AbstractMesh(
        (1,),
        ("x",),
        (jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"),
    )
    with jax.sharding.use_abstract_mesh(abstract):
        text = run.trace(*args, mask).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("flare_encode", "flare_decode", "flare_dz", "flare_dkv"):
        assert name in text
    assert ("flare_dq" in text) == (m > 256)
