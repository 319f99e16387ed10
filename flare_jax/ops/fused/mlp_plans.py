"""Block sizes of the residual MLP's kernels.

The table is filled from measurements and compiler output (README.md); nothing is tuned at run
time. To change a choice edit `plan_for`.
"""

import dataclasses

from jax import lax
from jax.experimental import pallas as pl

from flare_jax.ops.fused.tiles import SMS

SEEDS = "seeds"  # the axis name of a `vmap` over models: how many work at once decides the tiles


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel walks the tokens: `programs` programs, `tile` tokens at a time.

    In the table so many programs fill an H100; a plan has as many as share the tiles evenly.
    """

    tile: int
    warps: int
    programs: int
    stages: int = 2
    resident: int = 99  # the first layers' weights stay in shared memory, others' come from L2
    bias: bool = True  # biases and norm stay in registers, else they come from L1 with every tile


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of all kernels of an MLP."""

    forward: Tile
    backward: tuple[
        tuple[int, Tile], ...
    ]  # (layers, Tile) a segment, from the last; the end repeats
    norm: Tile | None = None  # the norm's backward in a kernel of its own, else in the last segment
    apart: bool = False  # MLPs on the same x in kernels of their own, which can run at once
    together: Tile | None = None  # else forward in one kernel with this tile (None: `forward`)


def streamed(tile: int, warps: int, programs: int) -> Tile:
    return Tile(tile, warps, programs, stages=1, resident=0, bias=False)


def few(
    tile: int, warps: int, kept: tuple[int, int] = (0, 0), segments: tuple[int, ...] = (5,)
) -> Plan:
    """One tile a program, whose weight gradients are written when they are there, never held.

    kept: how many layers' weights are read at once, in the forward and in the backward: one wait
    for L2 in place of one a layer, where shared memory has the room. segments: layers of each.
    """
    forward, backward = (
        Tile(tile, warps, 2 * SMS, stages=1, resident=resident, bias=False) for resident in kept
    )
    return Plan(forward, tuple((layers, backward) for layers in segments), apart=True)


# (C, precision) -> Plan; "native" is bfloat16 and float16.
PLANS = {
    (32, "native"): Plan(Tile(64, 4, 528, bias=False), ((5, Tile(64, 4, 264)),)),
    (64, "native"): Plan(
        Tile(64, 4, 396, stages=1, bias=False),
        ((3, Tile(64, 4, 264, stages=1, bias=False)), (2, Tile(64, 4, 264, bias=False))),
        together=Tile(64, 4, 264, stages=1, bias=False),
    ),
    (128, "native"): Plan(
        Tile(128, 8, 132, bias=False),
        ((1, Tile(128, 8, 132, stages=1, resident=4, bias=False)),),
        norm=Tile(32, 4, 528, stages=1),
    ),
    (32, "bf16x3"): Plan(Tile(64, 4, 528, bias=False), ((3, Tile(64, 4, 264)),)),
    (64, "bf16x3"): Plan(
        Tile(64, 4, 264, stages=1, bias=False),
        ((1, Tile(64, 4, 264, stages=1, resident=3, bias=False)),),
    ),
    (128, "bf16x3"): Plan(streamed(64, 4, 264), ((1, streamed(64, 4, 132)),)),
    (32, "ieee"): Plan(streamed(32, 4, 264), ((1, streamed(32, 4, 264)),)),
    (64, "ieee"): Plan(streamed(32, 4, 264), ((1, streamed(32, 4, 264)),)),
    (128, "ieee"): Plan(streamed(32, 8, 132), ((1, streamed(32, 8, 132)),)),
}


def plan_for(tokens: int, width: int, precision: str) -> Plan:
    """The plan for `tokens` of each of the models side by side (see SEEDS)."""
    programs = lambda tile: models() * pl.cdiv(tokens, tile)
    narrow = width <= 64 and precision != "ieee"
    if narrow and precision == "native" and programs(32) <= SMS:
        return few(32, 8, kept=(5, 5))
    if programs(16) <= SMS:
        return few(16, 8, kept=(0, 5 if narrow else 0))
    if narrow and programs(32) <= 2 * SMS:  # two of them fit on a multiprocessor
        return few(32, 4, segments=(3, 2))
    plan = PLANS[width, precision]
    if precision == "bf16x3" and width == 64 and programs(64) <= 4 * SMS:  # a round or two of them
        half = Tile(32, 4, 264, stages=1, bias=False)
        plan = dataclasses.replace(plan, backward=((3, half), (2, half)))
    return even(plan, tokens)


def even(plan: Plan, tokens: int) -> Plan:
    """The plan with programs that all have as many tiles, or one less: no more partial sums of
    weight gradients than that takes, and no last tile for which most of the device waits.
    """

    def tile(t: Tile | None) -> Tile | None:
        if t is None:
            return None
        tiles = pl.cdiv(tokens, t.tile)
        rounds = pl.cdiv(models() * tiles, t.programs)
        return dataclasses.replace(t, programs=pl.cdiv(tiles, rounds))

    return Plan(
        tile(plan.forward),
        tuple((layers, tile(t)) for layers, t in plan.backward),
        tile(plan.norm),
        plan.apart,
        tile(plan.together),
    )


def models() -> int:
    """How many models are computed side by side: the size of the mapped axis SEEDS, or 1."""
    try:
        return lax.axis_size(SEEDS)
    except NameError:
        return 1
