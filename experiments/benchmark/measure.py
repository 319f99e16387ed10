"""What all parts share: rows, programs compiled ahead, errors, clocks, the device's ceilings."""

import concurrent.futures
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flare_jax.ops.fused import math as kernels

TIMING_SECONDS = 0.5  # to spend on one median
TOLERANCE = {"bfloat16": 2e-2, "float32": 5e-3}  # float32 products may be TF32


@dataclasses.dataclass
class Row:
    """One line of the table: what it is, what to compile for it, how to fill it in.

    `measure` returns `error` {name: relative L2 error}, `ms` and `peak_bytes` of the whole row
    (forward and backward, or a training step), `forward_ms` where that is timed too, or `skipped`.
    """

    part: str
    labels: dict  # C, M, H, N, B, dtype, ...
    name: str  # implementation
    measure: Callable[[], dict]
    programs: tuple["Program", ...] = ()
    reference: "Program | None" = None
    rank: int = 0  # rows of a smaller rank run first
    work: dict = dataclasses.field(default_factory=dict)  # least bytes and exponentials of `ms`


class Program:
    """A function and the shapes of its arguments, compiled once, by a thread if asked to."""

    def __init__(self, function: Callable, *arguments, precision: str | None = None):
        shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
        self.arguments = jax.tree.map(shape, arguments)
        self.function, self.precision, self.future = function, precision, None
        # a reference is not timed, and choosing among its products takes longer than running it
        plain = precision is not None and jax.default_backend() == "gpu"
        self.options = {"xla_gpu_autotune_level": 0} if plain else None

    def compile(self):
        context = contextlib.nullcontext()
        if self.precision:
            context = jax.default_matmul_precision(self.precision)
        function = self.function if hasattr(self.function, "lower") else jax.jit(self.function)
        with context:
            return function.lower(*self.arguments).compile(self.options)

    def start(self, pool: concurrent.futures.Executor) -> concurrent.futures.Future:
        self.future = self.future or pool.submit(self.compile)
        return self.future

    @property
    def compiled(self):
        if self.future is None:
            self.future = concurrent.futures.Future()
            self.future.set_result(self.compile())
        return self.future.result()

    def __call__(self, *arguments):
        return self.compiled(*arguments)

    @property
    def peak_bytes(self) -> int:
        """Arguments, results and temporaries; donated arguments count once."""
        m = self.compiled.memory_analysis()
        size = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
        return size - m.alias_size_in_bytes


def compile_all(rows: list[Row], threads: int, seconds: float) -> None:
    """Compiles the programs of all rows; what is not begun after `seconds` is given up."""
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    programs = [p for row in rows for p in (*row.programs, row.reference) if p is not None]
    futures = [program.start(pool) for program in programs]
    concurrent.futures.wait(futures, timeout=seconds)
    pool.shutdown(wait=True, cancel_futures=True)  # nothing may compile beside a measurement


# ------------------------------------------------------------------------- checks ---


@jax.jit
def _relative(got, want):
    flat = lambda x: x.astype(jnp.float32).ravel()
    norm = lambda xs: jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in xs))
    got, want = ([flat(x) for x in jax.tree.leaves(tree)] for tree in (got, want))
    return norm([a - b for a, b in zip(got, want, strict=True)]) / norm(want)


def errors(got: dict, want: dict) -> dict[str, float]:
    """Relative L2 error of each named tree of arrays, all leaves of a tree together."""
    return {name: float(_relative(got[name], want[name])) for name in want}


def verdict(found: dict[str, float], tolerance: float) -> dict:
    """The row so far: its errors, and that it is wrong if it is. NaN is wrong too."""
    right = all(error <= tolerance for error in found.values())
    return {"error": found} if right else {"error": found, "skipped": "wrong: not timed"}


# ------------------------------------------------------------------------- clocks ---


def seconds(call: Callable, wait: Callable = jax.block_until_ready) -> float:
    """Median time of `call()`; short calls are queued several at a time before `wait(result)`."""
    wait(call())
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    chain = min(50, max(1, int(0.02 / once)))
    times = []
    for _ in range(min(20, max(3, int(TIMING_SECONDS / (once * chain))))):
        start = time.perf_counter()
        for _ in range(chain):
            result = call()
        wait(result)
        times.append((time.perf_counter() - start) / chain)
    return statistics.median(times)


def jax_times(forward: Program | None, whole: Program, arguments) -> dict:
    """`forward_ms`, `ms` and `peak_bytes` of two programs on the same arguments."""
    found = {"ms": 1e3 * seconds(lambda: whole(*arguments)), "peak_bytes": whole.peak_bytes}
    if forward is not None:
        found["forward_ms"] = 1e3 * seconds(lambda: forward(*arguments))
    return found


def ceilings(smoke: bool) -> dict[str, float]:
    """Bytes/s of a device copy (read and written) and exponentials/s, measured here."""
    size = 2**20 if smoke else 2**30
    x = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(jnp.negative)
    moved = 2 * size / seconds(lambda: copy(x))
    count = 2**16 if smoke else 2**23
    x, many = jnp.linspace(0, 1, count), 8 if smoke else 2048
    exponentials = jax.jit(lambda x: exponentiate(x, many))
    return {"bytes_per_s": moved, "exps_per_s": count * many / seconds(lambda: exponentials(x))}


def exponentiate(x: jax.Array, many: int) -> jax.Array:
    """`many` exponentials of each element, one after another, in registers: x = 2^-x."""
    if jax.default_backend() != "gpu":
        return jax.lax.fori_loop(0, many, lambda _, x: jnp.exp2(-x), x)

    def kernel(x_ref, out_ref):
        out_ref[...] = jax.lax.fori_loop(0, many, lambda _, x: kernels.exp2(-x), x_ref[...])

    tile = pl.BlockSpec((1024,), lambda i: (i,))
    options = dict(name="exponentiate", warps=4, stages=1, grid=(x.size // 1024,))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return kernels.pallas_call(kernel, in_specs=[tile], out_specs=tile, out_shape=shape, **options)(
        x
    )
