"""Splitting, padding and merging around cuDNN's calls, with dense stand-ins for the calls."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from jax._src.cudnn import fused_attention_stablehlo

from flare_jax import flare_attention, flare_encode
from flare_jax.ops import cudnn
from flare_jax.ops.fused.math import target


def dense(q, k, v, scale):
    s = scale * jnp.einsum("bmhd,bnhd->bmhn", q, k)
    lse = jax.nn.logsumexp(s, axis=-1)
    return jnp.einsum("bmhn,bnhd->bmhd", jnp.exp(s - lse[..., None]), v), lse


def dense_vjp(q, k, v, scale, out, lse, dout):
    a = jnp.exp(scale * jnp.einsum("bmhd,bnhd->bmhn", q, k) - lse[..., None])
    delta = jnp.sum(dout * out, -1)[..., None]
    ds = scale * a * (jnp.einsum("bmhd,bnhd->bmhn", dout, v) - delta)
    dv = jnp.einsum("bmhn,bmhd->bnhd", a, dout)
    return jnp.einsum("bmhn,bnhd->bmhd", ds, k), jnp.einsum("bmhn,bmhd->bnhd", ds, q), dv


supports, sdpa, sdpa_vjp = cudnn.supports, cudnn.sdpa, cudnn.sdpa_vjp
attention = jax.nn.dot_product_attention


@pytest.mark.parametrize("capability", ["7.5", "9.0"])
@pytest.mark.parametrize("platform", [None, "gpu"])
def test_the_device_that_computations_go_to_decides(monkeypatch, capability, platform):
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA", compute_capability=capability)
    cpu = jax.devices("cpu")[0]
    monkeypatch.setattr(jax, "devices", lambda *name: [gpu if name in ((), ("gpu",)) else cpu])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: None)
    q, k = jnp.zeros((8, 1, 8), jnp.bfloat16), jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    with jax.default_device(platform):
        assert target() is gpu
        if capability == "9.0":
            supports(q, k, k, None)
        else:
            with pytest.raises(NotImplementedError, match="capability 8.0, got 7.5"):
                supports(q, k, k, None)
    for default in (cpu, "cpu"):
        with jax.default_device(default), pytest.raises(NotImplementedError, match="'cpu'"):
            supports(q, k, k, None)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(cudnn, "supports", lambda *_: None)
    monkeypatch.setattr(cudnn, "sdpa", dense)
    monkeypatch.setattr(cudnn, "sdpa_vjp", dense_vjp)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *a, scale, implementation: plain(*a, scale=scale)
    )


@pytest.mark.parametrize(
    ("n", "d", "masked"), [(1024, 8, False), (1024, 4, False), (1301, 8, False), (1100, 8, True)]
)
def test_splits_give_the_whole(n, d, masked):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q, k, v, dy = draw(8, 2, d), draw(2, n, 2, d), draw(2, n, 2, d), draw(2, n, 2, d)
    dlse, mask = draw(2, 8, 2), None
    if masked:  # one sample without a real token
        mask = jnp.asarray(rng.random((2, n)) < 0.3).at[1].set(False)
        k, v, dy = (jnp.where(mask[:, :, None, None], x, jnp.nan) for x in (k, v, dy))
    assert cudnn.split_tokens(2, n, 2, 8)[0] > 1

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(q, k, v, implementation):
        options = dict(mask=mask, scale=0.5, implementation=implementation)
        y, pullback = jax.vjp(lambda *x: flare_attention(*x, **options), q, k, v)
        (z, lse), pull_encode = jax.vjp(lambda *x: flare_encode(*x, **options), q, k, v)
        lse = jnp.where(jnp.isfinite(lse), lse, 0)
        return y, *pullback(dy), z, lse, *pull_encode((z, dlse))

    names = ("y", "dq", "dk", "dv", "z", "lse", "dq of encode", "dk of encode", "dv of encode")
    for name, x, want in zip(names, run(q, k, v, "cudnn"), run(q, k, v, "reference"), strict=True):
        assert relative(x, want) <= 5e-6, name


@pytest.mark.parametrize("n", [1, 63, 972, 7225, 50_000, 1_000_000, 1_024_000])
def test_splits_cover_the_tokens_in_lengths_cudnn_takes(n):
    s, t = cudnn.split_tokens(1, n, 8, 128)
    assert s * t >= n > (s - 1) * t
    assert t % cudnn.TOKEN_MULTIPLE == 0
    assert s * 8 >= min(cudnn.BLOCKS, n // 512) / 2  # enough work to fill the device


MAPPED = [axes for axes in itertools.product([0, None], repeat=3) if 0 in axes]


@pytest.mark.parametrize("axes", MAPPED, ids=str)
def test_vmap_takes_any_of_the_arguments(monkeypatch, axes):
    monkeypatch.setattr(cudnn, "sdpa", sdpa)
    monkeypatch.setattr(cudnn, "sdpa_vjp", sdpa_vjp)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(
        fused_attention_stablehlo, "check_compute_capability", lambda *_, **__: True
    )
    shapes = (8, 2, 8), (2, 1100, 2, 8), (2, 1100, 2, 8)
    q, k, v = (
        jax.ShapeDtypeStruct(s if axis is None else (3, *s), jnp.bfloat16)
        for s, axis in zip(shapes, axes, strict=True)
    )

    def f(q, k, v):
        y, pullback = jax.vjp(functools.partial(flare_attention, implementation="cudnn"), q, k, v)
        return y, *pullback(y)

    got = jax.eval_shape(jax.vmap(f, axes), q, k, v)
    assert [x.shape for x in got] == [(3, *shapes[i]) for i in (1, 0, 1, 2)]


@pytest.mark.parametrize("axes", MAPPED, ids=str)
def test_a_mapped_axis_becomes_part_of_the_batch(axes):
    rng = np.random.default_rng(0)
    shapes = (2, 8, 1, 4), (2, 5, 1, 4), (2, 5, 1, 4)
    shapes = [s if axis is None else (3, *s) for s, axis in zip(shapes, axes, strict=True)]
    args = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
    f = lambda q, k, v: dense(q, k, v, 0.5)
    for got, want in zip(
        jax.vmap(cudnn.folded(f), axes)(*args), jax.vmap(f, axes)(*args), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
