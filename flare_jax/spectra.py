"""What a trained model's mixers do: spectra of every block and head on given samples."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float
from rich.table import Table

from flare_jax.models.flare import FLAREConfig, FLAREModel
from flare_jax.models.functional import functional
from flare_jax.ops.spectrum import (
    AVERAGING,
    averaging_heads,
    effective_rank,
    mixing_spectrum,
    second_eigenvalue,
)
from flare_jax.predict import Surrogate
from flare_jax.train.loop import MATMUL

THRESHOLDS = (0.5, 0.1, 1e-2, 1e-4)  # eigenvalues above them are counted
CAPTION = (
    "medians over samples and heads; rank: exp of the entropy of the eigenvalues λ; "
    f"averaging: heads with λ₂ < {AVERAGING:g}"
)


class ModelSpectra(NamedTuple):
    """Of L blocks on n samples, in float64."""

    eigenvalues: Float[np.ndarray, "L n H M"]  # descending
    floor: Float[np.ndarray, "L n H"]  # smaller eigenvalues are round-off
    vectors: Float[np.ndarray, "L n N H R"]  # eigenvectors of the R largest


def queries_and_keys(
    model: FLAREModel, x: Float[Array, "B N I"], mask: Bool[Array, "B N"] | None = None
) -> list[tuple[Float[Array, "M H D"], Float[Array, "B N H D"]]]:
    """Latent queries and keys that enter the operator in each block, for encoded inputs x."""
    if mask is not None:
        x = jnp.where(mask[:, :, None], x, 0)
    x, found = model.in_proj(x.astype(model.dtype)), []
    for block in blocks_of(model):
        found.append(block.att.project(x, (block.att.k_proj,), block.norm1))
        x = block(x, mask)
    return found


def blocks_of(model: FLAREModel) -> Sequence[nnx.Module]:
    """The blocks one by one, also where their parameters are stacked."""
    if not model.config.scan_blocks:
        return model.blocks
    take = lambda i: jax.tree.map(lambda a: a[i], model.blocks)
    return [take(i) for i in range(model.config.num_blocks)]


def model_spectra(
    surrogate: Surrogate,
    x: Float[Array | np.ndarray, "n N in"],
    mask: Bool[Array | np.ndarray, "n N"] | None = None,
    *,
    num_vectors: int = 0,
) -> ModelSpectra:
    """Spectra of every block and head of a trained model for raw inputs x.

    The model runs in its own precision; the spectra of its queries and keys are in float64.
    """
    pairs = queries_and_keys_of(surrogate, x, mask)
    scale = surrogate.config.model.attn_scale
    with jax.enable_x64(True):
        wide = lambda a: np.asarray(a).astype(np.float64)
        options = dict(mask=mask, scale=scale, num_vectors=num_vectors)
        found = [_spectrum(wide(q), wide(k), **options) for q, k in pairs]
    stack = lambda arrays: np.stack([np.asarray(a) for a in arrays])
    return ModelSpectra(*map(stack, zip(*found, strict=True)))


def queries_and_keys_of(
    surrogate: Surrogate,
    x: Float[Array | np.ndarray, "n N in"],
    mask: Bool[Array | np.ndarray, "n N"] | None = None,
) -> list[tuple[Float[Array, "M H D"], Float[Array, "n N H D"]]]:
    """`queries_and_keys` of a trained model for raw inputs x, in the model's own precision."""
    config = surrogate.config
    widths = len(surrogate.x_normalizer.mean), len(surrogate.y_normalizer.mean)
    dtype = "bfloat16" if config.train.precision == "bfloat16" else "float32"
    with jax.default_matmul_precision(MATMUL[config.train.precision]):
        x = surrogate.x_normalizer.encode(np.asarray(x, np.float32))
        return _projection(config.model, *widths, dtype)(surrogate.params, x, mask)


@functools.cache  # spectra of one model at several times compile once
def _projection(config: FLAREConfig, in_dim: int, out_dim: int, dtype: str):
    make = lambda: FLAREModel(config, in_dim, out_dim, dtype=dtype, rngs=nnx.Rngs(0))
    return jax.jit(functional(nnx.eval_shape(make), queries_and_keys)[0])


_spectrum = jax.jit(mixing_spectrum, static_argnames=("scale", "num_vectors"))


def summary(spectra: ModelSpectra) -> list[dict]:
    """One dict a block: medians over samples and heads, and the share of averaging heads."""
    median = lambda x: float(np.median(x))
    rows = []
    for number, values in enumerate(spectra.eigenvalues, 1):  # [n, H, M]
        with jax.enable_x64(True):
            rank, second = (np.asarray(f(values)) for f in (effective_rank, second_eigenvalue))
            share = float(np.mean(averaging_heads(values)))
        counts = {f"{t:g}": median((values > t).sum(-1)) for t in THRESHOLDS}
        rows.append(
            {
                "block": number,
                "effective_rank": median(rank),
                "second_eigenvalue": median(second),
                "averaging_heads": share,
                "eigenvalues_above": counts,
            }
        )
    return rows


def summary_table(rows: list[dict], title: str) -> Table:
    """The summary as a table for the terminal."""
    table = Table(title=title, caption=CAPTION)
    for name in ("block", "rank", "λ₂", "averaging"):
        table.add_column(name, justify="right")
    for threshold in THRESHOLDS:
        table.add_column(f"λ > {threshold:g}", justify="right")
    for row in rows:
        table.add_row(
            str(row["block"]),
            f"{row['effective_rank']:.2f}",
            f"{row['second_eigenvalue']:.2g}",
            f"{row['averaging_heads']:.0%}",
            *(f"{count:g}" for count in row["eigenvalues_above"].values()),
        )
    return table


def write(path: Path, spectra: ModelSpectra, **facts) -> None:
    """The summary and all eigenvalues as JSON, with what else is worth knowing."""
    values = {
        **facts,
        "averaging_below": AVERAGING,
        "summary": summary(spectra),
        "floor": float(spectra.floor.max()),
        "eigenvalues [block, sample, head, M]": spectra.eigenvalues.tolist(),
    }
    path.write_text(json.dumps(values, indent=1) + "\n")
