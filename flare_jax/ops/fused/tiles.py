"""Block sizes of the operator's kernels, and the shapes that follow from them.

The table is filled from measurements and compiler output (README.md); nothing is tuned at run
time. To change a choice edit `tile_for`.
"""

import dataclasses
import functools
import math

import jax
from jax.experimental import pallas as pl

from flare_jax.ops.fused.math import f32_precision, interpreted, target

SMS = 132  # streaming multiprocessors, where no device says otherwise (H100, H200)


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work."""

    tokens: int  # tokens per inner iteration
    latents: int  # latents per program (encode, dz, dq) or per inner chunk (decode, dkv)
    warps: int = 4
    stages: int = 3  # buffers of the software pipeline
    waves: int = 4  # programs per streaming multiprocessor; more programs, shorter ones


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call. Heads narrower than 16 share a program: `group` heads, `width` columns.

    16 columns fill the tensor core's inner dimension and make whole 32-byte sectors (bfloat16).
    """

    b: int
    n: int
    m: int
    h: int
    d: int
    precision: str  # of dots: "native" (16-bit), "fast" or "exact" (float32)

    @property
    def group(self) -> int:
        return math.gcd(self.h, max(1, 16 // self.d))

    @property
    def width(self) -> int:
        return self.group * self.d

    @property
    def groups(self) -> int:
        return self.h // self.group


def pow2(x: int) -> int:
    return 1 << (x - 1).bit_length()


def traced_once(*static: int):
    """Jits a function whose positional arguments `static` are Python values.

    The blocks of a model then trace and lower its kernels once, not once each. What the function
    reads beside its arguments, block sizes and kind of products, is part of the key.
    """

    def decorate(f):
        numbers = (0, *(i + 1 for i in static))
        jitted = jax.jit(lambda setting, *args: f(*args), static_argnums=numbers)

        @functools.wraps(f)
        def call(*args):
            setting = tuple(TABLE.items()), multiprocessors(), interpreted(), f32_precision()
            return jitted(setting, *args)

        return call

    return decorate


def multiprocessors() -> int:
    device = target()
    return getattr(device, "core_count", None) or SMS if device.platform == "gpu" else SMS


# (kernel, precision of dots, size): the choice at width 16. See `tile_for` for what is missing
# and for other widths.
TABLE = {
    ("encode", "native", "usual"): Tile(64, 128, 4, 3, 8),
    ("encode", "native", "few latents"): Tile(128, 64, 4, 3, 4),
    ("encode", "native", "many latents"): Tile(64, 128, 4, 3, 8),
    ("encode", "native", "few tokens"): Tile(64, 128, 4, 3, 4),
    ("encode", "native", "two heads"): Tile(128, 64, 4, 3, 8),
    ("encode", "fast", "usual"): Tile(64, 128, 4, 3, 8),
    ("encode", "fast", "few tokens"): Tile(64, 128, 4, 3, 2),
    ("encode", "fast", "many latents"): Tile(64, 128, 4, 3, 8),
    ("encode", "fast", "two heads"): Tile(64, 64, 4, 3, 8),
    ("encode", "exact", "usual"): Tile(32, 64, 4, 2, 4),
    ("decode", "native", "usual"): Tile(64, 128, 4, 3, 16),
    ("decode", "native", "many latents"): Tile(128, 64, 4, 2, 32),
    ("decode", "native", "few tokens"): Tile(64, 128, 4, 2, 64),
    ("decode", "fast", "usual"): Tile(64, 128, 4, 3, 16),
    ("decode", "fast", "few tokens"): Tile(64, 128, 4, 2, 64),
    ("decode", "fast", "many latents"): Tile(128, 128, 8, 2, 64),
    ("decode", "exact", "usual"): Tile(64, 64, 4, 1, 64),
    ("dz", "native", "usual"): Tile(64, 128, 4, 3, 8),
    ("dz", "native", "many latents"): Tile(64, 128, 4, 3, 16),
    ("dz", "native", "few tokens"): Tile(64, 128, 4, 3, 4),
    ("dz", "fast", "usual"): Tile(64, 128, 4, 3, 8),
    ("dz", "fast", "few tokens"): Tile(64, 128, 4, 3, 2),
    ("dz", "fast", "many latents"): Tile(64, 128, 4, 3, 8),
    ("dz", "exact", "usual"): Tile(32, 64, 4, 2, 4),
    ("dkv", "native", "usual"): Tile(64, 64, 4, 2, 3),
    ("dkv", "native", "many latents"): Tile(64, 64, 4, 2, 8),
    ("dkv", "native", "two heads"): Tile(32, 64, 2, 2, 6),
    ("dkv", "fast", "usual"): Tile(32, 64, 2, 1, 4),
    ("dkv", "fast", "many latents"): Tile(64, 64, 4, 1, 16),
    ("dkv", "fast", "two heads"): Tile(64, 64, 4, 1, 4),
    ("dkv", "exact", "usual"): Tile(32, 32, 4, 1, 4),
    ("dq", "native", "many latents"): Tile(64, 64, 4, 3, 8),
    ("dq", "fast", "many latents"): Tile(64, 64, 4, 1, 8),
    ("dq", "exact", "many latents"): Tile(32, 32, 4, 1, 8),
}
FEW_TOKENS = 4096  # in the batch; below, what counts is the number of steps one after another
DQ_IN_REGISTERS = 256 * 16  # latents x columns; above, dq has a kernel of its own


def fuses_dq(shape: Shape) -> bool:
    """Whether the kernel of dk and dv also holds dq of all latents.

    Four heads a program with operands in two halves need more shared memory than there is.
    """
    heads = shape.group // 2 if shape.precision != "native" else 1
    return pow2(shape.m) * shape.width * max(1, heads) <= DQ_IN_REGISTERS


def entry_for(kernel: str, shape: Shape) -> tuple[str, str, str]:
    """The key of TABLE: sizes and precisions without an entry share that of a coarser class."""
    many = kernel == "dq" or (not fuses_dq(shape) if kernel == "dkv" else shape.m > 256)
    few = shape.b * shape.n <= FEW_TOKENS
    sizes = ["many latents"] * many + ["few tokens"] * (few and not many)
    pairs = shape.group == 2 and shape.m > 64 and not few
    sizes += ["few latents"] * (shape.m <= 64) + ["two heads"] * pairs + ["usual"]
    precisions = [shape.precision] + ["fast"] * (shape.precision == "exact")
    keys = [(kernel, precision, size) for precision in precisions for size in sizes]
    return next(key for key in keys if key in TABLE)


def tile_for(kernel: str, shape: Shape) -> Tile:
    tile = TABLE[entry_for(kernel, shape)]
    latents = tile.latents if shape.width <= 32 else tile.latents // 2
    if kernel == "dq":  # 64 rows, or Triton falls back from a warpgroup's products to a warp's
        latents = tile.latents
    latents = min(latents, max(16, pow2(shape.m)))
    tokens = min(tile.tokens, max(16, pow2(shape.n)))
    # a warp owns 16 rows: fewer rows than that a warp make Triton compute the scores twice
    rows = latents if kernel in ("encode", "dz", "dq") else tokens
    return dataclasses.replace(
        tile, latents=latents, tokens=tokens, warps=min(tile.warps, max(1, rows // 16))
    )


def splits_for(shape: Shape, tile: Tile, blocks: int) -> tuple[int, int]:
    """(splits, token tiles per split): `blocks` x splits programs fill the device in waves."""
    total = pl.cdiv(shape.n, tile.tokens)
    wanted = max(1, multiprocessors() * tile.waves * 4 // tile.warps // blocks)
    each = pl.cdiv(total, wanted)
    return pl.cdiv(total, each), each
