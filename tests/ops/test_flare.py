"""Every implementation of the operator faces the same cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from jax.test_util import check_grads

from flare_jax import flare_attention, flare_decode, flare_encode
from flare_jax.ops import flare, xla
from flare_jax.ops.fused import tiles

NAMES = ("y", "dq", "dk", "dv")
IMPLEMENTATIONS = [
    "reference",
    "xla",
    "fused",  # in interpret mode unless there is a GPU
    pytest.param("cudnn", marks=pytest.mark.gpu),
]
# name: (B, N, M, H, D, masked)
CASES = {
    "plain": (2, 40, 8, 2, 8, False),
    "ragged": (1, 37, 16, 4, 4, False),
    "masked": (3, 41, 8, 2, 16, True),
    "one_token": (2, 1, 8, 1, 8, False),
    "one_latent": (1, 33, 1, 2, 32, True),
    "large_scores": (1, 64, 8, 1, 8, False),
}
TOLERANCE = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 2e-2, "float16": 3e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Makes the xla implementation walk over several tiles, the last one ragged."""
    monkeypatch.setattr(xla, "SCORES_PER_TILE", 1)
    monkeypatch.setattr(xla, "MIN_TILE", 16)


@pytest.fixture(autouse=True)
def interpret(request, monkeypatch):
    """Lets the kernels run on a CPU where a test asks for them, several splits of few tokens."""
    params = getattr(request.node, "callspec", None)
    if params and params.params.get("implementation") == "fused":
        if jax.default_backend() != "gpu":
            monkeypatch.setenv("FLARE_JAX_INTERPRET", "1")
        monkeypatch.setattr(tiles, "multiprocessors", lambda: 2)


def inputs(case, dtype=np.float32, seed=0):
    """q, k, v, dy and mask of a case; masked tokens hold NaN, the last sample is all padding."""
    b, n, m, h, d, masked = CASES[case]
    rng = np.random.default_rng(seed)
    size = 2.5 if case == "large_scores" else 1.0
    q, k, v, dy = (
        jnp.asarray(size * rng.standard_normal(s), dtype)
        for s in ((m, h, d), (b, n, h, d), (b, n, h, d), (b, n, h, d))
    )
    if not masked:
        return q, k, v, dy, None
    mask = rng.random((b, n)) < 0.6
    mask[-1] = b == 1 and mask[-1]
    nan = lambda x: jnp.where(mask[:, :, None, None], x, jnp.nan)
    return q, nan(k), nan(v), nan(dy), jnp.asarray(mask)


@functools.partial(jax.jit, static_argnames=("implementation", "scale"))
def value_and_gradients(q, k, v, dy, mask, implementation, scale=0.7):
    f = lambda q, k, v: flare_attention(
        q, k, v, mask=mask, scale=scale, implementation=implementation
    )
    return pull(f, q, k, v, dy)


@functools.partial(jax.jit, static_argnums=0)
def pull(f, q, k, v, dy):
    """f's value and its gradients, as one program."""
    y, pullback = jax.vjp(f, q, k, v)
    return y, *pullback(dy)


@functools.cache
def oracle(case, dtype):
    """float64 value and gradients of the rounded inputs, by autodiff of the dense equations."""
    q, k, v, dy, mask = inputs(case, dtype)
    with jax.enable_x64(True):
        q, k, v, dy = (jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, dy))
        dense = flare.reference
        f = lambda q, k, v: dense.decode(q, k, dense.encode(q, k, v, mask, 0.7)[0], mask, 0.7)
        dy = dy if mask is None else jnp.where(mask[:, :, None, None], dy, 0)
        return tuple(np.asarray(x) for x in pull(f, q, k, v, dy))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_the_dense_equations(implementation, case, dtype):
    q, k, v, dy, mask = inputs(case, dtype)
    try:
        flare.pick(implementation, q, k, v, mask)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    results = value_and_gradients(q, k, v, dy, mask, implementation)
    # With one token y = v: dq and dk are sums that cancel to zero, so their error is absolute.
    floor = float(jnp.linalg.norm(dy.astype(jnp.float32))) if case == "one_token" else 0.0
    for name, x, want in zip(NAMES, results, oracle(case, dtype), strict=True):
        assert x.dtype == dtype
        assert relative(x, want, floor) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["operator_d4", "operator_d8"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "fused"])
def test_matches_the_authors_code(golden, implementation, name, dtype):
    g = golden(name)
    tokens = lambda x: jnp.asarray(np.swapaxes(x, -3, -2), dtype)  # heads first -> tokens first
    if (implementation, dtype) == ("fused", "float64"):
        pytest.skip("the kernels take no float64")
    with jax.enable_x64(dtype == "float64"):
        q, k, v, dy = (tokens(g[x]) for x in ("q", "k", "v", "dy"))
        scale = float(g["scale"])
        z, _ = flare_encode(q, k, v, scale=scale, implementation=implementation)
        results = value_and_gradients(q, k, v, dy, None, implementation, scale)
        for key, x in zip(("z", *NAMES), (z, *results), strict=True):
            assert relative(x, tokens(g[key])) <= TOLERANCE[dtype], key


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_of_both_halves_are_derivatives(implementation):
    with jax.enable_x64(True):
        q, k, v, _, _ = inputs("ragged", np.float64)
        mask = jnp.arange(k.shape[1])[None] % 5 > 0
        options = {"mask": mask, "scale": 0.6, "implementation": implementation}
        encode = jax.jit(functools.partial(flare_encode, **options))
        check_grads(encode, (q, k, v), 1, modes=["rev"])
        z, _ = encode(q, k, v)
        check_grads(jax.jit(functools.partial(flare_decode, **options)), (q, k, z), 1, ["rev"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_permuting_points_permutes_the_output(implementation):
    dtype = "bfloat16" if implementation == "cudnn" else "float32"
    q, k, v, dy, _ = inputs("plain", dtype)
    order = np.random.default_rng(1).permutation(k.shape[1])
    y, dq, dk, dv = value_and_gradients(q, k, v, dy, None, implementation)
    moved = value_and_gradients(q, k[:, order], v[:, order], dy[:, order], None, implementation)
    for x, want in zip(moved, (y[:, order], dq, dk[:, order], dv[:, order]), strict=True):
        assert relative(x, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_is_invisible(implementation):
    dtype = "bfloat16" if implementation == "cudnn" else "float32"
    q, k, v, dy, _ = inputs("plain", dtype)
    y, dq, dk, dv = value_and_gradients(q, k, v, dy, None, implementation)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, 7), (0, 0), (0, 0)), constant_values=jnp.nan)
    mask = jnp.broadcast_to(jnp.arange(47) < 40, (2, 47))
    padded = value_and_gradients(q, pad(k), pad(v), pad(dy), mask, implementation)
    cut = [padded[0][:, :40], padded[1], padded[2][:, :40], padded[3][:, :40]]
    for name, x, want in zip(NAMES, cut, (y, dq, dk, dv), strict=True):
        assert relative(x, want) <= TOLERANCE[dtype], name
    for x in (padded[0], *padded[2:]):
        assert not np.any(np.asarray(x[:, 40:], np.float32))


@pytest.mark.parametrize("implementation", ["reference", "xla", "fused"])
def test_parts_merge_by_log_sum_exp(implementation):
    q, k, v, _, _ = inputs("plain")
    mask = jnp.ones(k.shape[:2], bool).at[0].set(False).at[1, 23:].set(False)  # sample 0: no token

    def merged(q, k, v):
        (z1, l1), (z2, l2) = (
            flare_encode(q, k[:, s], v[:, s], mask=mask[:, s], implementation=implementation)
            for s in (slice(0, 23), slice(23, 40))
        )
        l1, l2 = (jnp.maximum(lse, -1e30) for lse in (l1, l2))
        lse = jnp.logaddexp(l1, l2)
        return jnp.exp(l1 - lse)[..., None] * z1 + jnp.exp(l2 - lse)[..., None] * z2

    whole = lambda q, k, v: flare_encode(q, k, v, mask=mask, implementation=implementation)[0]
    for f, g in (
        (merged, whole),
        *[(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (0, 1, 2)) for f in (merged, whole))],
    ):
        found, wanted = (jax.tree.leaves(jax.jit(x)(q, k, v)) for x in (f, g))
        for x, want in zip(found, wanted, strict=True):
            assert relative(x, want) <= TOLERANCE["float32"]


def test_a_constant_field_stays_constant():
    q, k, v, _, _ = inputs("ragged")
    np.testing.assert_allclose(flare_attention(q, k, jnp.ones_like(v)), 1.0, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["reference", "xla", "fused"])
def test_vmap_scan_and_remat_change_nothing(implementation):
    q, k, v, _, _ = inputs("ragged")
    f = functools.partial(flare_attention, implementation=implementation)
    loss = lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v)))
    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    stack = lambda x: jnp.stack([x, 2 * x])
    want = jax.tree.map(lambda *x: jnp.stack(x), grad(q, k, v), grad(2 * q, 2 * k, 2 * v))
    batched = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2))))(stack(q), stack(k), stack(v))
    scanned = jax.lax.scan(
        lambda _, x: (None, jax.grad(jax.checkpoint(loss), (0, 1, 2))(*x)),
        None,
        (stack(q), stack(k), stack(v)),
    )[1]
    for result in (batched, scanned):
        for x, w in zip(result, want, strict=True):
            assert relative(x, w) <= TOLERANCE["float32"]


def test_memory_is_linear_in_tokens(monkeypatch):
    monkeypatch.setattr(xla, "SCORES_PER_TILE", 2**18)
    n, m, h, d = 2**17, 256, 2, 4
    q = jax.ShapeDtypeStruct((m, h, d), jnp.float32)
    k = jax.ShapeDtypeStruct((1, n, h, d), jnp.float32)
    run = jax.jit(lambda q, k, v, dy: value_and_gradients(q, k, v, dy, None, "xla"))
    memory = run.lower(q, k, k, k).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (n * h * d * 4)  # a few token arrays
    assert memory.temp_size_in_bytes < n * m * h * 4 / 10  # and no N x M array


@pytest.mark.parametrize("implementation", ["xla", "fused"])
def test_residuals_are_linear_in_tokens(implementation):
    q, k, v, _, _ = inputs("plain")
    f = functools.partial(flare_attention, implementation=implementation)
    kept = jax.eval_shape(lambda *x: jax.vjp(f, *x)[1], q, k, v)
    floats = sum(x.size for x in jax.tree.leaves(kept))
    b, n, m, h, d, _ = CASES["plain"]
    output = b * n * h * (d + 1) if implementation == "fused" else 0  # y and decode's log-sum-exp
    assert floats <= h * (2 * b * n * d + m * d + b * m * (d + 1)) + output


def test_lowers_for_tpu_without_one():
    q, k, v, dy, _ = inputs("masked", "bfloat16")
    mask = jnp.ones(k.shape[:2], bool)
    f = jax.jit(lambda *x: value_and_gradients(*x, "xla"))
    text = f.trace(q, k, v, dy, mask).lower(lowering_platforms=("tpu",)).as_text()
    assert "dot_general" in text and "custom_call" not in text


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_two_runs_give_the_same_bits(implementation):
    args = inputs("plain", "bfloat16")
    for x, y in zip(*(value_and_gradients(*args, implementation) for _ in range(2)), strict=True):
        assert np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


ARRAY = jnp.ones((2, 5, 2, 4))
BAD = {
    "q must be": (dict(q=jnp.ones((3, 4))), ValueError),
    "q must be .* not empty": (dict(q=jnp.ones((0, 2, 4))), ValueError),
    "q and k must have the same heads": (dict(q=jnp.ones((3, 2, 8))), ValueError),
    "v must be .* to match": (dict(v=jnp.ones((2, 5, 1, 4))), ValueError),
    "k must be .* not empty": (dict(k=jnp.ones((2, 0, 2, 4))), ValueError),
    "v must have the dtype of k": (dict(v=ARRAY.astype(jnp.bfloat16)), TypeError),
    "k must be an array of floats": (dict(k=jnp.ones((2, 5, 2, 4), int)), TypeError),
    "q must be an array of floats .*, got None": (dict(q=None), TypeError),
    "v must be .* 16 bits or more": (dict(v=ARRAY.astype(jnp.float8_e4m3fn)), TypeError),
    "mask must be .*, got True": (dict(mask=True), ValueError),
    "scale must be .*, got '1'": (dict(scale="1"), ValueError),
    "scale must be .*, got None": (dict(scale=None), ValueError),
    "implementation must be of .*, got 3": (dict(implementation=3), ValueError),
    "implementation must be of .*, got 'x'": (dict(implementation=("xla", "x")), ValueError),
    "mask must be a bool array": (dict(mask=jnp.ones((2, 5))), ValueError),
    "mask must be .* of shape": (dict(mask=jnp.ones((2, 4), bool)), ValueError),
    "scale must be a positive": (dict(scale=0.0), ValueError),
    "implementation must be of": (dict(implementation="cuda"), ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    change, error = BAD[message]
    arguments = dict(q=jnp.ones((3, 2, 4)), k=ARRAY, v=ARRAY) | change
    q, k, v = (arguments.pop(x) for x in "qkv")
    with pytest.raises(error, match=message):
        flare_attention(q, k, v, **arguments)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a CPU has no cuDNN")
def test_an_implementation_that_cannot_run_says_why():
    q, k, v, _, _ = inputs("plain")
    with pytest.raises(NotImplementedError, match="cudnn needs an NVIDIA GPU"):
        flare_attention(q, k, v, implementation="cudnn")
    y = flare_attention(q, k, v, implementation=("cudnn", "xla"))
    assert relative(y, flare_attention(q, k, v)) == 0
