"""The operator: every implementation, plain cuDNN and two PyTorch SDPA calls.

Least work of forward and backward, in arrays of N C elements and in exponentials a score (N H M
scores). A token's score is needed again once z is known, and again for dz and for the rest:

    forward     encode reads k, v; decode reads k, writes y                     4 arrays   2 exps
    backward    dz: reads k, dy; then reads k, v, dy and writes dk, dv          7 arrays   2 exps
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments.benchmark.measure import TOLERANCE, Program, Row, errors, jax_times, verdict
from flare_jax.ops.flare import IMPLEMENTATIONS, flare_attention

ARRAYS, EXPS = 4 + 7, 2 + 2
DENSE_SCORES = 2**29  # above, the float32 reference is computed in tiles
NAMES = ("y", "dq", "dk", "dv")


def rows(n: int, sizes, dtypes, heads: int = 8) -> list[Row]:
    return [row for size in sizes for dtype in dtypes for row in case_rows(n, heads, *size, dtype)]


def case_rows(n: int, h: int, c: int, m: int, dtype: str) -> list[Row]:
    case = Case(n, h, c, m, dtype)
    scores, size = n * h * m, jnp.dtype(dtype).itemsize
    shared = dict(
        part="operator",
        labels={"C": c, "M": m, "H": h, "N": n, "B": 1, "dtype": dtype},
        work={"bytes": ARRAYS * n * c * size, "exps": EXPS * scores},
    )
    late = (dtype == "float32") + (m > 512)
    found = []
    for name in [name for name in IMPLEMENTATIONS if name != "reference"]:
        f = functools.partial(flare_attention, implementation=name)
        found.append(jax_row(case, name, f, rank=late + (name == "xla"), **shared))
    found.append(jax_row(case, "cudnn, plain", plain_cudnn, rank=late, **shared))
    for mode in ("torch eager", "torch compile"):
        measure = functools.partial(measure_torch, case, mode)
        rank = late + (mode == "torch compile")
        found.append(Row(name=f"{mode}, 2 SDPA", measure=measure, rank=rank, **shared))
    return [dataclasses.replace(row, reference=case.reference) for row in found]


class Case:
    """The arrays of a size and dtype, and what the float32 reference makes of them."""

    def __init__(self, n: int, h: int, c: int, m: int, dtype: str):
        self.n, self.dtype, self.shapes = n, dtype, ((m, h, c // h), *[(1, n, h, c // h)] * 3)
        dense = "reference" if n * h * m <= DENSE_SCORES else "xla"
        f = functools.partial(flare_attention, implementation=dense)
        abstract = self.abstract("float32")
        self.reference = Program(forward_and_backward(f), *abstract, precision="highest")

    def abstract(self, dtype: str):
        return [jax.ShapeDtypeStruct(shape, dtype) for shape in self.shapes]

    def arrays(self) -> list[jax.Array]:
        """q, k, v and the cotangent dy."""
        keys = jax.random.split(jax.random.key(0), 4)
        pairs = zip(keys, self.shapes, strict=True)
        return [jax.random.normal(key, shape, self.dtype) for key, shape in pairs]

    def expected(self) -> dict:
        return expected_of(self)


@functools.lru_cache(maxsize=1)  # of one case: 1.6 GB at a million tokens
def expected_of(case: Case) -> dict:
    arrays = [x.astype("float32") for x in case.arrays()]
    return dict(zip(NAMES, case.reference(*arrays), strict=True))


def forward_and_backward(f):
    def both(q, k, v, dy):
        y, pullback = jax.vjp(f, q, k, v)
        return y, *pullback(dy)

    return both


def plain_cudnn(q, k, v):
    """Two calls of `jax.nn`, nothing split; head widths padded to what cuDNN takes."""
    d = q.shape[-1]
    grow = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -d % 8)))
    q, k, v = grow(q[None]), grow(k), grow(v)
    sdpa = functools.partial(jax.nn.dot_product_attention, scale=1.0, implementation="cudnn")
    return sdpa(k, q, sdpa(q, k, v))[..., :d]


def jax_row(case: Case, name: str, f, **shared) -> Row:
    arrays = case.abstract(case.dtype)
    forward = Program(lambda q, k, v, dy: f(q, k, v), *arrays)
    both = Program(forward_and_backward(f), *arrays)

    def measure() -> dict:
        arrays = case.arrays()
        got = dict(zip(NAMES, both(*arrays), strict=True))
        row = verdict(errors(got, case.expected()), TOLERANCE[case.dtype])
        del got
        return row if "skipped" in row else row | jax_times(forward, both, arrays)

    return Row(name=name, measure=measure, programs=(forward, both), **shared)


def measure_torch(case: Case, mode: str) -> dict:
    """The published formulation; gradients are on in the forward too, as in training."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from experiments.benchmark import torch_side

    q, k, v, dy = map(torch_side.to_torch, case.arrays())
    q = q.permute(1, 0, 2)[None].contiguous().requires_grad_()  # [1, H, M, D]
    # As a model would hand them over: a projection's [B, N, C], seen heads first.
    k, v = (x.transpose(1, 2).requires_grad_() for x in (k, v))
    dy = dy.transpose(1, 2)
    two_calls = lambda q, k, v: sdpa(k, q, sdpa(q, k, v, scale=1.0), scale=1.0)
    f = torch_side.compiled(two_calls, mode)

    def both():
        y = f(q, k, v)
        return y, *torch.autograd.grad(y, (q, k, v), dy)

    y, dq, dk, dv = both()
    tokens = lambda x: torch_side.to_jax(x.transpose(1, 2))
    found = (tokens(y), torch_side.to_jax(dq[0].permute(1, 0, 2)), tokens(dk), tokens(dv))
    row = verdict(
        errors(dict(zip(NAMES, found, strict=True)), case.expected()), TOLERANCE[case.dtype]
    )
    del y, dq, dk, dv, found
    return row if "skipped" in row else row | torch_side.times(lambda: f(q, k, v), both)
