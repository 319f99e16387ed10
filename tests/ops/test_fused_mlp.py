"""The residual MLP kernels against autodiff of the plain equations (interpret mode on a CPU)."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flare_jax.ops.fused import mlp, mlp_plans
from flare_jax.ops.fused.math import shared_memory
from flare_jax.ops.fused.mlp_plans import SEEDS, Depth, few

# tiny tiles, few programs: several tiles a program, two and one layers a segment
TILE = mlp.Tile(16, 4, 2)
PLAN = mlp.Plan(TILE, ((3, TILE), (1, dataclasses.replace(TILE, resident=0, bias=False))))
C = 32


@jax.numpy_rank_promotion("allow")
def reference(x, layers, act="gelu", norm=None, skip=False):
    raw = x = x.astype(jnp.float32)
    if norm is not None:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        x = (x - mean) / jnp.sqrt(var + 1e-5) * norm[0] + norm[1]
    f = functools.partial(jax.nn.gelu, approximate=True) if act == "gelu" else jax.nn.silu
    for w, b in layers[:-1]:
        x = x + f(x @ w + b)
    w, b = layers[-1]
    return x + x @ w + b + (raw if skip else 0)


def inputs(shape=(2, 21), width=C, depth=5, dtype=jnp.float32, seed=0):
    """x, layers, norm, and a cotangent."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 * depth + 4))
    normal = lambda *s: jax.random.normal(next(keys), s)  # noqa: E731
    x, dy = normal(*shape, width).astype(dtype), normal(*shape, width).astype(dtype)
    layers = tuple((normal(width, width) / width**0.5, 0.3 * normal(width)) for _ in range(depth))
    return x, layers, (1 + 0.2 * normal(width), 0.2 * normal(width)), dy


def value_and_grads(f, dy, *args):
    out, vjp = jax.vjp(f, *args)
    return {"out": out, "grads": vjp(dy)}


def assert_close(got, want, tolerance):
    """Each leaf by name, in relative norm; nan fails."""
    got, want = (jax.tree_util.tree_leaves_with_path(t) for t in (got, want))
    assert len(got) == len(want)
    for (path, a), (_, b) in zip(got, want, strict=True):
        assert a.shape == b.shape
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"


def check(x, layers, norm, dy, tolerance, *, act="gelu", skip=False, plan=PLAN, precision=None):
    f = functools.partial(
        mlp.residual_mlp, act=act, skip=skip, plan=plan, precision=precision, interpret=True
    )
    norms = () if norm is None else (norm,)
    run = lambda f: jax.jit(  # noqa: E731
        lambda dy, *a: value_and_grads(lambda x, w, *n: f(x, w, norm=n[0] if n else None), dy, *a)
    )
    got = run(f)(dy, x, layers, *norms)
    assert got["out"].dtype == got["grads"][0].dtype == x.dtype
    assert got["grads"][1][0][0].dtype == layers[0][0].dtype
    want = run(functools.partial(reference, act=act, skip=skip))(
        dy.astype(jnp.float32), x.astype(jnp.float32), layers, *norms
    )
    assert_close(got, want, tolerance)


def test_plan_counts_the_models_side_by_side():
    def tile_of(models, tokens, *case):
        found = []
        f = lambda x: found.append(mlp.plan_for(tokens, *case)) or x
        jax.make_jaxpr(jax.vmap(f, axis_name=SEEDS))(jnp.zeros(models))
        return found[0].forward.tile if found[0].apart else None

    assert mlp.plan_for(1944, 64, "native") == few(32, 8, kept=(5, 5))
    assert [tile_of(n, 1944, 64, "bf16x3") for n in (1, 2, 4, 5)] == [16, 32, 32, None]
    assert [tile_of(n, 1944, 64, "ieee") for n in (1, 2)] == [16, None]
    assert [tile_of(n, 1944, 128, "native") for n in (1, 2)] == [16, None]
    assert [tile_of(n, 1000, 64, "native") for n in (4, 8, 9)] == [32, 32, None]


def test_programs_share_the_tiles_evenly():
    base = mlp_plans.PLANS[64, "bf16x3"]
    for tokens in (20_224, 17_000, 10**6):
        tile = mlp.plan_for(tokens, 64, "bf16x3").forward
        tiles = -(-tokens // tile.tile)
        most = -(-tiles // base.forward.programs)  # of one program, with the table's number
        assert (tile.programs - 1) * most < tiles <= tile.programs * most
        assert tile.programs <= base.forward.programs


# layers up to which the table's plan is what the compiler takes for an H100 (None: any number)
DEEPEST = {
    (128, "native", 10_000): 6,
    (128, "native", 10**6): 5,
    (128, "bf16x3", 10**6): None,
    (64, "native", 10**6): 23,
    (64, "bf16x3", 10_000): 9,
    (64, "bf16x3", 10**6): 13,
    (64, "ieee", 10**6): None,
    (32, "native", 10**6): 24,
}


@pytest.mark.parametrize("case", DEEPEST, ids=str)
def test_plans_that_fit_on_an_h100_are_those_of_the_table(case):
    width, precision, tokens = case
    plan, deepest = mlp.plan_for(tokens, width, precision), DEEPEST[case]
    of = lambda layers: mlp_plans.fitted(plan, Depth(tokens, width, precision, layers))
    assert all(of(layers) == plan for layers in range(1, (deepest or 24) + 1))
    if deepest is not None and width > 32:
        assert of(deepest + 1) != plan


# what the compiler asked for, with norm (and projection at C = 64): forward, largest backward
@pytest.mark.parametrize(
    ("capability", "depth", "forward", "backward"),
    [
        ("9.0", Depth(10**6, 128, "native", 5), 230_400, 204_800),
        ("9.0", Depth(10**6, 128, "native", 8), 328_704, 233_472),
        ("9.0", Depth(10_000, 128, "native", 8), 294_912, 200_704),
        ("9.0", Depth(10**6, 64, "native", 14, projected=True), 131_072, 151_552),
        ("9.0", Depth(10**6, 64, "bf16x3", 14, projected=True), 262_144, 92_160),
        ("9.0", Depth(10_000, 64, "bf16x3", 5, projected=True), 114_688, 156_672),
        ("9.0", Depth(10**6, 128, "bf16x3", 5), 98_304, 133_120),
        ("8.0", Depth(10**6, 128, "native", 5), 230_400, 262_144),
        ("8.0", Depth(10**6, 64, "native", 5, projected=True), 57_344, 107_520),
        ("8.0", Depth(10**6, 64, "bf16x3", 5, projected=True), 114_688, 106_496),
        ("8.0", Depth(10**6, 128, "bf16x3", 5), 98_304, 135_168),
    ],
)
def test_shared_memory_is_bounded(monkeypatch, capability, depth, forward, backward):
    monkeypatch.setattr(mlp_plans, "capability", lambda: capability)
    plan = mlp.plan_for(depth.tokens, depth.width, depth.precision)
    assert mlp_plans.forward_bytes(plan.forward, depth) >= forward
    assert mlp_plans.backward_bytes(plan, dataclasses.replace(depth, linear_last=True)) >= backward


@pytest.mark.parametrize(("capability", "kilobytes"), [("8.0", 163), ("8.9", 99), ("9.0", 227)])
@pytest.mark.parametrize("layers", [5, 8, 14])
@pytest.mark.parametrize("precision", ["native", "bf16x3"])
@pytest.mark.parametrize("width", [64, 128])
def test_deep_mlps_keep_fewer_weights(monkeypatch, capability, kilobytes, layers, precision, width):
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert shared_memory() == 1024 * kilobytes
    x = jax.ShapeDtypeStruct((10**6, width), jnp.bfloat16 if precision == "native" else jnp.float32)
    weights = jax.ShapeDtypeStruct((width, width), x.dtype), jax.ShapeDtypeStruct((width,), x.dtype)
    if (capability, width, precision) == ("8.9", 128, "bf16x3"):
        with pytest.raises(NotImplementedError, match="shared memory"):
            mlp.supports(x, [weights] * layers, interpret=False)
        return
    mlp.supports(x, [weights] * layers, interpret=False)
    depth = Depth(10**6, width, precision, layers)
    plan = mlp_plans.fitted(mlp.plan_for(10**6, width, precision), depth)
    assert mlp_plans.forward_bytes(plan.forward, depth) <= shared_memory()
    assert mlp_plans.backward_bytes(plan, depth) <= shared_memory()


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("with_norm", [False, True])
def test_value_and_gradients(act, with_norm):
    x, layers, norm, dy = inputs()
    check(x, layers, norm if with_norm else None, dy, 1e-5, act=act, skip=with_norm)


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [(jnp.bfloat16, None, 2e-2), (jnp.float16, None, 3e-3), (jnp.float32, "bf16x3", 1e-4)],
)
def test_precisions(dtype, precision, tolerance):
    x, layers, norm, dy = inputs(dtype=dtype)
    check(x, layers, norm, dy, tolerance, skip=True, precision=precision)


@pytest.mark.parametrize("tokens", [1, 16, 48])
def test_token_counts(tokens):
    x, layers, _, dy = inputs((tokens,))
    check(x, layers, None, dy, 1e-5)


def test_a_tile_a_program_with_weights_kept():
    x, layers, norm, dy = inputs((48,))
    check(x, layers, norm, dy, 1e-5, skip=True, plan=few(16, 4, kept=(2, 5), segments=(3, 2)))


def test_one_and_two_layers():
    for depth, plan in ((1, PLAN), (2, dataclasses.replace(PLAN, norm=TILE))):
        x, layers, norm, dy = inputs(depth=depth)
        check(x, layers, norm, dy, 1e-5, skip=True, plan=plan)


def test_table_covers_every_case():
    for width in mlp.WIDTHS:
        for precision in ("native", "bf16x3", "ieee"):
            for tokens in (100, 10**6):
                plan = mlp.plan_for(tokens, width, precision)
                cuts = [s[:2] for s in mlp.segments(5, plan, normed=False)]
                assert cuts[0][1] == 5
                assert cuts[-1][0] == 0


@pytest.mark.parametrize("with_norm", [False, True])
def test_pair_equals_two(with_norm):
    x, layers_k, norm, dy = inputs()
    _, layers_v, _, dy2 = inputs(seed=1)
    norm = norm if with_norm else None

    def pair(x, layers_k, layers_v, norm):
        return mlp.residual_mlps(x, (layers_k, layers_v), norm=norm, plan=PLAN, interpret=True)

    def singles(x, layers_k, layers_v, norm):
        return reference(x, layers_k, norm=norm), reference(x, layers_v, norm=norm)

    args = (x, layers_k, layers_v, norm)
    got, want = (jax.jit(functools.partial(value_and_grads, f))((dy, dy2), *args)
                 for f in (pair, singles))  # fmt: skip
    assert_close(got, want, 1e-5)


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"), [(jnp.float32, None, 1e-5), (jnp.bfloat16, None, 2e-2)]
)
def test_projection_of_another_array_is_added_first(dtype, precision, tolerance):
    x, layers, norm, dy = inputs(dtype=dtype)
    y, (dense, *_), _, _ = inputs(dtype=dtype, seed=1)

    def fused(x, y, dense, layers, norm):
        options = dict(norm=norm, skip=True, plan=PLAN, precision=precision, interpret=True)
        return mlp.residual_mlp(x, layers, projection=(y, *dense), **options)

    def plain(x, y, dense, layers, norm):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        with jax.numpy_rank_promotion("allow"):
            x = x + y @ dense[0] + dense[1]
        return reference(x, layers, norm=norm, skip=True)

    args = (x, y, dense, layers, norm)
    got = jax.jit(functools.partial(value_and_grads, fused))(dy, *args)
    want = jax.jit(functools.partial(value_and_grads, plain))(dy.astype(jnp.float32), *args)
    assert_close(got, want, tolerance)
    x, y = x[0], y[0]
    alone = jax.jit(fused)(x, y, dense, layers, norm)  # without a backward to come
    assert_close(alone, got["out"][0], 1e-6 if dtype == jnp.float32 else 2e-2)
    saved = jax.eval_shape(lambda *a: jax.vjp(fused, *a)[1], x, y, dense, layers, norm)
    tokens = [a for a in jax.tree.leaves(saved) if a.shape[:1] == x.shape[:1]]
    assert sum(a.size for a in tokens) == 2 * x.size


def test_vmap_over_seeds_equals_loop():
    both = [inputs(seed=s) for s in (0, 1)]
    x, layers, norm, dy = jax.tree.map(lambda *a: jnp.stack(a), *both)
    f = functools.partial(mlp.residual_mlp, plan=PLAN, interpret=True)

    def run(x, layers, norm, dy):
        return value_and_grads(lambda x, w, n: f(x, w, norm=n), dy, x, layers, norm)

    got = jax.jit(jax.vmap(run))(x, layers, norm, dy)
    want = jax.tree.map(lambda *a: jnp.stack(a), *[jax.jit(run)(*b) for b in both])
    assert_close(got, want, 1e-6)


def test_under_remat_and_scan():
    x, layers, _, _ = inputs((17,), depth=2)
    stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), layers)

    def loss(f, x, stacked):
        step = jax.checkpoint(lambda x, w: (f(x, w), None))
        return jnp.sum(jax.lax.scan(step, x, stacked)[0] ** 2)

    f = functools.partial(mlp.residual_mlp, plan=PLAN, interpret=True)
    got, want = (jax.jit(jax.grad(functools.partial(loss, g), (0, 1)))(x, stacked)
                 for g in (f, reference))  # fmt: skip
    assert_close(got, want, 1e-5)


def test_second_derivatives_are_refused_with_what_to_do():
    x, layers, _, _ = inputs((16,), depth=2)
    f = functools.partial(mlp.residual_mlp, plan=PLAN, interpret=True)
    gradient = jax.grad(lambda x: jnp.sum(f(x, layers) ** 2))
    with pytest.raises(NotImplementedError, match='implementation="xla"'):
        jax.grad(lambda x: jnp.sum(gradient(x) ** 2))(x)


def test_only_x_is_kept_for_the_backward():
    x, layers, _, _ = inputs((64,))
    f = functools.partial(mlp.residual_mlp, plan=PLAN, interpret=True)
    saved = jax.eval_shape(lambda x, w: jax.vjp(f, x, w)[1], x, layers)
    tokens = [a for a in jax.tree.leaves(saved) if a.shape[:1] == (64,)]
    assert sum(a.size for a in tokens) == x.size


def test_unsupported_says_why():
    x, layers, _, _ = inputs()
    mlp.supports(x, layers, interpret=True)
    with pytest.raises(NotImplementedError, match="activation"):
        mlp.supports(x, layers, "relu", interpret=True)
    with pytest.raises(NotImplementedError, match="widths"):
        mlp.supports(x, ((jnp.zeros((C, 2 * C)), jnp.zeros(2 * C)),), interpret=True)
    with pytest.raises(NotImplementedError, match="width 48"):
        mlp.supports(jnp.zeros((3, 48)), layers, interpret=True)
    if jax.default_backend() != "gpu":
        with pytest.raises(NotImplementedError, match="platform"):
            mlp.supports(x, layers, interpret=False)


@pytest.mark.parametrize(
    ("width", "dtype", "tokens"),
    [(64, jnp.bfloat16, 1000), (64, jnp.float32, 10**6), (128, jnp.bfloat16, 10**6)],
)
def test_lowers_for_cuda_without_a_gpu(width, dtype, tokens):
    x = jax.ShapeDtypeStruct((tokens, width), dtype)
    f32 = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    layers = ((f32(width, width), f32(width)),) * 5
    norm = (f32(width), f32(width))

    def f(x, layers, norm):
        out, vjp = jax.vjp(
            lambda *a: mlp.residual_mlp(*a[:2], norm=a[2], skip=True, interpret=False),
            x, layers, norm,
        )  # fmt: skip
        return vjp(out)

    with h100():
        text = jax.jit(f).trace(x, layers, norm).lower(lowering_platforms=("cuda",)).as_text()
    plan = mlp.plan_for(tokens, width, mlp.dot_precision(x.dtype))
    names = {f"flare_mlp_bwd_{first}_{end}" for first, end, _ in mlp.segments(5, plan, normed=True)}
    assert set(re.findall(r"flare_mlp\w*", text)) == {"flare_mlp", *names}


def h100():
    """The device that lowering asks for its architecture, where jax wants one (0.11 and newer)."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

    try:
        device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    except TypeError:
        device = AbstractDevice("NVIDIA H100 80GB HBM3", 132)
    return use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device))
