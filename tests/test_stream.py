"""A mesh in chunks gives the fields of the whole mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from flax import nnx

from flare_jax import predict, stream
from flare_jax.models import FLAREConfig, FLAREModel, functional
from flare_jax.predict import Surrogate
from flare_jax.problems.problem import Normalizer
from flare_jax.stream import make_streamed
from flare_jax.train.config import Config

LAYERS = ("k_proj", "v_proj", "ffn", "in_out_proj")
SHALLOW = {f"num_layers_{name}": 0 for name in LAYERS}
CONFIG = FLAREConfig(16, num_blocks=2, num_heads=2, num_latents=8, **SHALLOW)


def model(config, dtype=jnp.float32):
    apply, params = functional(FLAREModel(config, 3, 2, dtype=dtype, rngs=nnx.Rngs(0)))
    grow = lambda path, p: 20 * p if path[-1].key == "latent_q" else p  # uneven weights
    return jax.jit(apply), jax.tree_util.tree_map_with_path(grow, params)


@pytest.mark.parametrize("chunk", [7, 25, 64])
def test_chunks_give_the_fields_of_the_whole_mesh(chunk):
    apply, params = model(CONFIG)
    x = np.random.default_rng(0).standard_normal((1, 50, 3)).astype(np.float32)
    streamed = make_streamed(CONFIG, 3, 2, chunk)
    assert relative(streamed(params, x), apply(params, x)) < 2e-6


def test_masked_points_and_stacked_blocks():
    config = dataclasses.replace(CONFIG, scan_blocks=True, qk_norm=True)
    apply, params = model(config)
    x = np.random.default_rng(0).standard_normal((1, 23, 3)).astype(np.float32)
    mask = np.arange(23)[None] < 9  # the second and third chunks hold no real point
    x[~mask] = np.nan
    found, want = make_streamed(config, 3, 2, 9)(params, x, mask), apply(params, x, mask)
    assert relative(found[mask], np.asarray(want)[mask]) < 2e-6


def test_bfloat16_loses_no_more_in_chunks():
    exact, params = model(CONFIG)
    apply, _ = model(CONFIG, jnp.bfloat16)
    x = np.random.default_rng(0).standard_normal((1, 64, 3)).astype(np.float32)
    want = exact(params, x)
    found = make_streamed(CONFIG, 3, 2, 8, jnp.bfloat16)(params, x)
    assert relative(found, want) < 1.2 * relative(apply(params, x), want)


def test_the_device_holds_one_chunk(monkeypatch):
    _, params = model(CONFIG)
    before = jax.live_arrays()  # kept: a new array must not get the id of one of these
    others, seen = {id(x) for x in before}, []
    asarray = np.asarray

    def watch(a, *args, **kwargs):
        if isinstance(a, jax.Array):
            seen.append(sum(x.size for x in jax.live_arrays() if id(x) not in others))
        return asarray(a, *args, **kwargs)

    monkeypatch.setattr(np, "asarray", watch)
    x = np.zeros((1, 4000, 3), np.float32)
    make_streamed(CONFIG, 3, 2, 100)(params, x)
    z = 8 * (16 + 2)  # and its lse
    assert len(seen) >= 40 * 4 and max(seen) <= 100 * 16 + z


def test_few_chunks_are_sent_ahead(monkeypatch):
    _, params = model(CONFIG)
    wait, waits = jax.block_until_ready, []
    monkeypatch.setattr(jax, "block_until_ready", lambda z: waits.append(wait(z)))
    x = np.zeros((1, 4000, 3), np.float32)
    make_streamed(CONFIG, 3, 2, 100)(params, x)
    assert len(waits) == CONFIG.num_blocks * 40 // stream.AHEAD


def test_a_surrogate_streams_what_is_larger_than_a_chunk_and_says_so(caplog, monkeypatch):
    apply, params = model(CONFIG)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 50, 3)).astype(np.float32)
    mask = rng.random((2, 50)) < 0.8
    norms = Normalizer.fit(x), Normalizer(np.full(2, 3, np.float32), np.full(2, 5, np.float32))
    config = Config(None, CONFIG)
    surrogate = Surrogate("toy", config, apply, params, *norms)
    want = surrogate(x, mask)
    assert not caplog.records
    found = surrogate(x, mask, chunk=20)
    assert "50 points: streamed, 20 at a time" in caplog.text
    assert relative(found[mask], want[mask]) < 2e-6
    with monkeypatch.context() as patch:  # the programs are there
        patch.setattr(predict, "make_streamed", None)
        np.testing.assert_array_equal(surrogate(x, mask, chunk=20), found)
    with pytest.raises(ValueError, match="chunk must be at least 1 point, got 0"):
        surrogate(x, chunk=0)
