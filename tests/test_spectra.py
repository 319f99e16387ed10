"""Spectra of a model's blocks: the queries and keys are those that enter the operator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flare_jax import spectra
from flare_jax.models import FLAREConfig, FLAREModel, functional
from flare_jax.models import flare as flare_model
from flare_jax.predict import Surrogate
from flare_jax.problems.darcy import DarcyConfig
from flare_jax.problems.problem import Normalizer
from flare_jax.train.config import Config

MODEL = FLAREConfig(
    channel_dim=8, num_blocks=2, num_heads=2, num_latents=4, num_layers_k_proj=0, num_layers_ffn=0
)


@pytest.mark.parametrize("change", [{}, {"scan_blocks": True, "qk_norm": True}])
def test_queries_and_keys_are_those_of_the_forward_pass(change, monkeypatch):
    model = FLAREModel(dataclasses.replace(MODEL, **change), 2, 1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 2))
    mask = jnp.arange(9)[None] < jnp.array([[9], [6]])
    x = jnp.where(mask[..., None], x, jnp.nan)
    found = spectra.queries_and_keys(model, x, mask)
    seen = []
    operator = flare_model.flare_attention

    def spy(q, k, v, **options):
        jax.debug.callback(lambda q, k: seen.append((q, k)), q, k, ordered=True)
        return operator(q, k, v, **options)

    monkeypatch.setattr(flare_model, "flare_attention", spy)
    jax.block_until_ready(model(x, mask))
    jax.effects_barrier()
    assert len(seen) == len(found) == MODEL.num_blocks
    for want, got in zip(seen, found, strict=True):
        for a, b in zip(want, got, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_model_spectra_honour_scale_mask_and_normalisation():
    config = Config(DarcyConfig(), dataclasses.replace(MODEL, attn_scale=3.0))
    apply, params = functional(FLAREModel(config.model, 2, 1, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda p: 3 * p, params)
    normalizers = (
        Normalizer(np.full(n, 5.0, np.float32), np.full(n, 2.0, np.float32)) for n in (2, 1)
    )
    surrogate = Surrogate("darcy", config, apply, params, *normalizers)
    x = np.random.default_rng(0).standard_normal((2, 9, 2)).astype(np.float32)
    whole = spectra.model_spectra(surrogate, x, num_vectors=1)
    assert whole.eigenvalues.shape == (2, 2, 2, 4) and whole.eigenvalues.dtype == np.float64
    np.testing.assert_allclose(whole.vectors, 1, atol=1e-10)  # the first eigenvector
    padded = np.concatenate([x, np.full((2, 3, 2), np.nan, np.float32)], axis=1)
    masked = spectra.model_spectra(surrogate, padded, np.tile(np.arange(12) < 9, (2, 1)))
    np.testing.assert_allclose(masked.eigenvalues, whole.eigenvalues, atol=1e-5)
    q, k = functional(FLAREModel(config.model, 2, 1, rngs=nnx.Rngs(0)), spectra.queries_and_keys)[
        0
    ](params, (x - 5) / 2)[1]
    s = 3 * np.einsum("mhd,bnhd->bhmn", np.float64(q), np.float64(k))
    a = np.exp(s)
    w = (a / a.sum(2, keepdims=True)).swapaxes(2, 3) @ (a / a.sum(3, keepdims=True))
    want = -np.sort(-np.linalg.eigvals(w).real)[..., :4]
    np.testing.assert_allclose(whole.eigenvalues[1], want, atol=1e-5)
