"""Block sizes of the residual MLP's kernels.

The table is filled from measurements and compiler output (README.md); nothing is tuned at run
time. To change a choice edit `plan_for`. The table's plans are for MLPs of the default depth on an
H100: `fitted` makes others of them for deeper ones and for devices with less shared memory.
"""

import dataclasses

from jax import lax
from jax.experimental import pallas as pl

from flare_jax.ops.fused.math import capability, shared_memory
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


def segments(layers: int, plan: Plan, normed: bool) -> list[tuple[int, int, Tile]]:
    """[(first, end, Tile), ...] of the backward kernels, last segment first."""
    cuts, end = [], layers
    while end:
        length, tile = plan.backward[min(len(cuts), len(plan.backward) - 1)]
        first = max(0, end - length)
        cuts.append((first, end, tile))
        end = first
    return [*cuts, (0, 0, plan.norm)] if normed and plan.norm else cuts


# --------------------------------------------------------------- shared memory ---


@dataclasses.dataclass(frozen=True)
class Depth:
    """What `fitted` has to know of the MLPs."""

    tokens: int
    width: int
    precision: str
    layers: int
    sets: int = 1
    normed: bool = True
    linear_last: bool = True
    projected: bool = False

    @property
    def item(self) -> int:
        """Bytes of a number as the products take it: bf16x3 has two halves."""
        return 2 if self.precision == "native" else 4

    @property
    def weight(self) -> int:
        return self.width**2 * self.item

    def rows(self, tile: Tile) -> int:
        """Bytes of a tile of tokens."""
        return tile.tile * self.width * self.item

    def stages(self, tile: Tile) -> int:
        """Buffers of each load: what a program loads for its only tile it loads once."""
        return 1 if self.single(tile) else tile.stages

    def single(self, tile: Tile) -> bool:
        """Whether a program has one tile of tokens at most."""
        return pl.cdiv(self.tokens, tile.tile) <= tile.programs

    def streamed(self, count: int, stages: int) -> int:
        """Bytes for `count` weights that are read with every tile, ahead of it if there are stages.

        Without, one buffer serves all.
        """
        return self.weight * (stages * count if stages > 1 else min(count, 1))


def forward_bytes(tile: Tile, depth: Depth, sets: int = 1) -> int:
    """Shared memory of a program of the forward, from compiler output (README.md)."""
    stages, kept = depth.stages(tile), min(tile.resident, depth.layers)
    return (
        (sets * kept + depth.projected) * depth.weight
        + depth.streamed(sets * (depth.layers - kept), stages)
        + stages * depth.rows(tile)
        + 1024 * (stages > 1)
    )


def backward_bytes(plan: Plan, depth: Depth) -> int:
    """Most shared memory of a program of the backward: bounds of what the compiler asked for.

    Beside weights and the segment's inputs: layers of the segment that are kept, for they are used
    transposed too, without a warpgroup's products (before 9.0) or with several in halves; at the
    bottom the norm and the projection.
    """
    most, warpgroups = 0, not capability().startswith(("8.", "12."))
    for first, end, tile in segments(depth.layers, plan, False):
        stages, kept, rows = depth.stages(tile), min(tile.resident, end), depth.rows(tile)
        linear = end == depth.layers and depth.linear_last
        size = kept * depth.weight + stages * (end - first + 1) * rows
        size += 4096 * (linear + warpgroups)
        early = warpgroups and kept and depth.single(tile)  # all it reads, before it works
        if not early and (not linear or end - first > 1):
            size += depth.streamed(end - kept, stages)
        halves = depth.precision == "bf16x3" and end - first > 1
        if kept > first and (halves or not warpgroups):
            size += 2 * depth.weight + 1024
        if first == 0:
            size += rows * (2 * depth.projected + (depth.normed and plan.norm is None))
        most = max(most, size)
    return most


def shares(tile: Tile, width: int, precision: str) -> bool:
    """Whether a forward kernel takes several MLPs: all their weights on the chip, or none."""
    return not tile.resident or (precision == "native" and width <= 64)


def leaner(plan: Plan, resident: int) -> Plan:
    """The plan with at most `resident` layers' weights in shared memory, and nothing read ahead."""

    def tile(t: Tile) -> Tile:
        return dataclasses.replace(t, resident=min(resident, t.resident), stages=1)

    backward = tuple((length, tile(t)) for length, t in plan.backward)
    return dataclasses.replace(plan, forward=tile(plan.forward), backward=backward)


def fitted(plan: Plan, depth: Depth) -> Plan:
    """`plan` itself if its kernels fit into shared memory, else with fewer weights kept there.

    Raises:
        NotImplementedError: they do not fit with none kept.
    """
    limit = shared_memory()
    candidates = [plan, *(leaner(plan, count) for count in reversed(range(depth.layers + 1)))]

    def first(size):
        for candidate in candidates:
            if size(candidate) <= limit:
                return candidate
        raise NotImplementedError(
            f"width {depth.width} needs more than the device's {limit} bytes of shared memory"
        )

    forward = first(lambda plan: forward_bytes(plan.forward, depth)).forward
    backward = first(lambda plan: backward_bytes(plan, depth)).backward
    pair = plan.together or forward
    joint = depth.sets > 1 and shares(pair, depth.width, depth.precision)
    apart = plan.apart or (joint and forward_bytes(pair, depth, depth.sets) > limit)
    return dataclasses.replace(plan, forward=forward, backward=backward, apart=apart)


def models() -> int:
    """How many models are computed side by side: the size of the mapped axis SEEDS, or 1."""
    try:
        return lax.axis_size(SEEDS)
    except NameError:
        return 1
