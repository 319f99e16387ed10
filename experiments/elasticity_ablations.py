"""The ablations of FLARE's paper on elasticity: which models they train, and what was published.

Run by `python -m experiments.elasticity --ablations blocks heads depth`. Published values are test
rel-L2 of the last parameters after 500 epochs, one seed, on the published files, read back from the
figures of the authors' repository to about three digits. Ours beside them are also of the last
parameters.
"""

import dataclasses
from typing import Literal

from rich.console import Console
from rich.table import Table

from flare_jax.train.config import Config

Family = Literal["blocks", "heads", "depth"]

BLOCKS = (1, 2, 4, 8)  # columns of the first table; its rows are latents
PUBLISHED_BLOCKS = {
    16: (23.0e-3, 9.94e-3, 6.48e-3, 4.70e-3),
    64: (22.0e-3, 9.99e-3, 5.23e-3, 3.84e-3),
    256: (21.0e-3, 9.51e-3, 6.27e-3, 3.51e-3),
}
# By head width, and by hidden layers of the key and value MLPs; 8 blocks of 64 latents.
PUBLISHED_HEADS = {64: 5.62e-3, 32: 4.44e-3, 16: 3.98e-3, 8: 3.73e-3, 4: 3.45e-3, 2: 4.55e-3}
PUBLISHED_DEPTH = {0: 5.96e-3, 1: 3.91e-3, 2: 3.79e-3, 3: 3.77e-3, 4: 3.68e-3, 5: 3.57e-3}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model of a table."""

    family: Family
    label: str
    changes: dict  # of the paper preset's model: 8 blocks, 64 latents, 8 heads, 3 layers
    published: float  # test rel-L2


def folder(config: Config) -> str:
    """Name of a run: models that do not differ share one."""
    m = config.model
    heads = f"heads{m.num_heads}-kv{m.num_layers_k_proj}"
    return f"blocks{m.num_blocks}-latents{m.num_latents}-{heads}"


def cases(families: tuple[Family, ...]) -> list[Case]:
    """The models of these tables, small ones first."""
    found = [
        Case("blocks", f"{b} blocks, {m} latents", {"num_blocks": b, "num_latents": m}, value)
        for m, row in PUBLISHED_BLOCKS.items()
        for b, value in zip(BLOCKS, row, strict=True)
    ]
    found += [
        Case("heads", f"head width {d}", {"num_heads": 64 // d}, value)
        for d, value in PUBLISHED_HEADS.items()
    ]
    found += [
        Case(
            "depth",
            f"K and V of {n} layers",
            {"num_layers_k_proj": n, "num_layers_v_proj": n},
            value,
        )
        for n, value in PUBLISHED_DEPTH.items()
    ]
    found = [case for case in found if case.family in families]
    return sorted(found, key=lambda case: case.changes.get("num_blocks", 8))


def row(case: Case, result: dict) -> dict:
    """What the record keeps of a finished run."""
    return {
        "family": case.family,
        "case": case.label,
        "published_rel_l2": case.published,
        "rel_l2": result["rel_l2"],
        "parameters": result["parameters"],
    }


def show(rows: list[dict], epochs: int) -> None:
    """The rows as a table, ours beside the published values."""
    table = Table(f"{epochs} epochs", "test rel-L2", "over seeds", "published")
    for r in rows:
        error = r["rel_l2"]["last"]
        table.add_row(
            r["case"],
            f"{error['mean']:.5f}",
            f"± {error['std']:.5f}",
            f"{r['published_rel_l2']:.5f}",
        )
    Console().print(table)
