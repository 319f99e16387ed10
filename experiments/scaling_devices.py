"""Training steps of large meshes on one device and on all: time, memory, efficiency.

    python -m experiments.scaling_devices --out experiments/results/scaling_devices.json
    python -m experiments.scaling_devices --smoke --out FILE   # 8 CPU devices, tiny

A row is one step (loss, gradients, clipping, AdamW, running average) of the 8-block model in
bfloat16 on one sample of N points. Parts:

    devices   1, 2 and 4 million points, C = 64 and 128, M = 128, on one device and on all R:
              strong scaling  T_1(N) / (R T_R(N)),    memory  B_1(N) / (R B_R(N))
              weak scaling    T_1(N) / T_R(R N),      memory  B_1(N) / B_R(R N)
              and a million points' R-th part on one
    memory    1 million points, C = M = 64: what each of remat and scan_blocks costs and saves
    largest   C = M = 64: 8 million points on one device, and as many as its memory holds

Memory is what the compiled program needs on a device: arguments, results and temporaries, arrays
passed on in place counted once. Programs are compiled side by side before anything is timed. The
largest mesh comes first: it needs nearly all memory in one piece, which arrays of others part.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import records
from experiments.benchmark.layer import weights
from flare_jax import parallel
from flare_jax.models import FLAREConfig, FLAREModel, functional
from flare_jax.problems.metrics import rel_l2
from flare_jax.problems.problem import Normalizer, Split
from flare_jax.train.optimizer import OptimizerConfig, make_optimizer
from flare_jax.train.step import init_state, make_train_step, surrogate_loss

SHARE = 0.92  # of the device's memory that the largest mesh may need
SECONDS = 2.0  # of timed steps a row


@dataclasses.dataclass(frozen=True)
class Row:
    """A step to measure."""

    part: str
    model: FLAREConfig
    points: int
    devices: int

    @property
    def mesh(self) -> Mesh | None:
        devices = jax.devices()[: self.devices]
        return parallel.make_mesh(f"tokens={self.devices}", 1, devices)

    def labels(self) -> dict:
        m = self.model
        names = {"C": m.channel_dim, "M": m.num_latents, "remat": m.remat, "scan": m.scan_blocks}
        return {"part": self.part, **names, "N": self.points, "devices": self.devices}


def model(c: int, m: int, remat: bool = True, scan: bool = False, **change) -> FLAREConfig:
    config = FLAREConfig(c, num_blocks=8, num_latents=m, remat=remat, scan_blocks=scan)
    return dataclasses.replace(config, **change)


def rows(devices: int, smoke: bool) -> list[Row]:
    """All rows but the largest, smaller ones first."""
    million = 400 if smoke else 1_000_000
    layers = ("num_layers_ffn", "num_layers_k_proj", "num_layers_v_proj", "num_layers_in_out_proj")
    small = dict(num_blocks=1, **dict.fromkeys(layers, 0)) if smoke else {}
    found = [
        Row("memory", model(64, 64, remat, scan, **small), million, 1)
        for remat in (False, True)
        for scan in (False, True)
    ]
    for c in (64,) if smoke else (64, 128):
        counts = [n * million for n in ([1, 2] if smoke else [1, 2, 4])]
        row = lambda n, devices, c=c: Row("devices", model(c, 128, **small), n, devices)
        # a share of the smallest mesh, too: tells what messages cost from what few points cost
        found += [row(n, 1) for n in sorted({million // devices, *counts})]
        if devices > 1:
            spread = sorted({*counts, *(n * devices for n in counts)})
            found += [row(n, devices) for n in spread]
    found.append(Row("largest", model(64, 64, **small), 8 * million, 1))
    return sorted(found, key=lambda row: row.points * row.model.channel_dim / row.devices)


class Step:
    """The compiled training step of a row."""

    def __init__(self, row: Row):
        self.row, self.mesh = row, row.mesh
        make = lambda: FLAREModel(row.model, 3, 1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        self.apply, self.shapes = functional(nnx.eval_shape(make))
        self.tx = make_optimizer(OptimizerConfig(), 10_000)
        state = jax.eval_shape(functools.partial(init_state, tx=self.tx), self.shapes)
        sample = Split(*(jax.ShapeDtypeStruct((1, row.points, d), jnp.float32) for d in (3, 1)))
        options = {"compiler_options": parallel.compiler_options(row.points, self.mesh)}
        if self.mesh is not None:
            put = lambda tree, spec: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec)
                ),
                tree,
            )
            state, sample = put(state, P()), put(sample, P(None, parallel.TOKENS))
            options["out_shardings"] = NamedSharding(self.mesh, P())
        start = time.perf_counter()
        jitted = jax.jit(self.step(), donate_argnums=0, **options)
        self.compiled = jitted.lower(state, sample).compile()
        self.compile_seconds = time.perf_counter() - start

    def step(self):
        mesh, normalizer = self.mesh, Normalizer(np.zeros(1, np.float32), np.ones(1, np.float32))
        loss = surrogate_loss(
            parallel.model_over(self.apply, mesh),
            parallel.loss_over(rel_l2, mesh, self.row.points),
            normalizer,
        )
        return make_train_step(loss, self.tx, value_and_grad=parallel.value_and_grad(mesh))

    @property
    def bytes(self) -> int:
        """On one device."""
        m = self.compiled.memory_analysis()
        size = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
        return size - m.alias_size_in_bytes

    def measure(self) -> dict:
        rng = np.random.default_rng(0)
        n = self.row.points
        x = rng.random((1, n, 3), np.float32)
        samples = parallel.place_samples(Split(x, np.sin(6 * x[..., :1])), self.mesh)
        state = parallel.place(init_state(weights(self.shapes), self.tx), self.mesh)

        def run(steps):
            nonlocal state
            start, values = time.perf_counter(), []
            for _ in range(steps):  # queued: as in a loop, nobody waits for a step
                state, metrics = self.compiled(state, samples)
                values.append(metrics["loss"])
            values = jax.device_get(values)
            return (time.perf_counter() - start) / steps, values

        (_, first), (once, _) = run(1), run(2)
        chain = max(2, min(20, int(SECONDS / 3 / once)))
        _, *timed = [run(chain) for _ in range(4)]  # the first rows find the device cold
        losses = [*first, *(x for _, values in timed for x in values)]
        if not np.isfinite(losses).all():
            raise RuntimeError(f"{self.row.labels()}: losses {losses}")
        memory = jax.devices()[0].memory_stats() or {}
        return {
            "ms": 1e3 * statistics.median(seconds for seconds, _ in timed),
            "steps": 3 * chain,
            "bytes": self.bytes,
            "bytes_per_point": self.bytes * self.row.devices / n,
            "first_loss": float(losses[0]),
            "last_loss": float(losses[-1]),
            "peak_bytes_of_process": memory.get("peak_bytes_in_use"),
            "compile_seconds": self.compile_seconds,
        }


def measured(row: Row, step) -> dict:
    """The row's labels and numbers, or the reason why it has none."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    try:
        step = step() if callable(step) else step.result()
        if limit and step.bytes > limit:
            found = {"skipped": f"needs {step.bytes / 1e9:.1f} of {limit / 1e9:.1f} GB"}
            return row.labels() | found | {"bytes": step.bytes}
        return row.labels() | step.measure()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return row.labels() | {"skipped": str(error)[:300]}


def largest(row: Row, step: concurrent.futures.Future) -> Row | None:
    """As many points as fit, from the memory that `row` needs; None if nobody knows the limit."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if not limit or step.exception():
        return None
    most = (2**31 - 1) // row.model.channel_dim  # elements of an array are counted in 32 bits
    points = min(int(row.points * SHARE * limit / step.result().bytes), most)
    points = points // 1_000_000 * 1_000_000
    return dataclasses.replace(row, points=points)


def efficiencies(results: list[dict]) -> list[dict]:
    """Strong and weak scaling of every pair of rows that allows it."""
    key = lambda r: (r["C"], r["N"], r["devices"])
    rows = {key(r): r for r in results if r["part"] == "devices" and "ms" in r}
    found = []
    for (c, n, devices), one in rows.items():
        for (c2, n2, count), many in rows.items():
            if devices != 1 or count == 1 or c2 != c or n2 not in (n, n * count):
                continue
            share = count if n2 == n else 1
            found.append(
                {
                    "kind": "strong" if n2 == n else "weak",
                    "C": c,
                    "N on one": n,
                    "devices": count,
                    "time": one["ms"] / (share * many["ms"]),
                    "memory": one["bytes"] / (share * many["bytes"]),
                }
            )
    return sorted(found, key=lambda e: (e["kind"], e["C"], e["N on one"]))


def table(results: list[dict], scaling: list[dict]) -> str:
    lines = [
        f"{'part':8} {'C':>4} {'M':>4} {'remat':>5} {'scan':>5} {'points':>9} {'devices':>7} "
        f"{'ms/step':>9} {'GB/device':>9} {'bytes/point':>11}"
    ]
    for r in results:
        head = (
            f"{r['part']:8} {r['C']:4} {r['M']:4} {r['remat']!s:>5} {r['scan']!s:>5} "
            f"{r['N']:9} {r['devices']:7} "
        )
        if "skipped" in r:
            lines.append(head + r["skipped"])
        else:
            lines.append(
                head + f"{r['ms']:9.2f} {r['bytes'] / 1e9:9.3f} {r['bytes_per_point']:11.0f}"
            )
    lines.append(
        f"\n{'scaling':8} {'C':>4} {'N on one':>9} {'devices':>7} {'time':>6} {'memory':>6}"
    )
    for e in scaling:
        lines.append(
            f"{e['kind']:8} {e['C']:4} {e['N on one']:9} {e['devices']:7} {e['time']:6.3f} "
            f"{e['memory']:6.3f}"
        )
    return "\n".join(lines)


def write(path: Path, results: list[dict], smoke: bool) -> list[dict]:
    scaling = efficiencies(results)
    record = {
        "command": records.command("scaling_devices", None),
        "smoke": smoke,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "dtype": "bfloat16",
        "blocks": 8,
        "batch": 1,
        "rows": results,
        "scaling": scaling,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return scaling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("experiments/results/scaling_devices.json")
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on 8 CPU devices")
    parser.add_argument("--parts", nargs="*", default=["devices", "memory", "largest"])
    parser.add_argument("--threads", type=int, default=8, help="programs compiled side by side")
    parser.add_argument(
        "--compile", action="store_true", help="no more, for a later run: jax's cache keeps it"
    )
    options = parser.parse_args()
    if options.smoke:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    todo = [r for r in rows(jax.device_count(), options.smoke) if r.part in options.parts]
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}: {len(todo)} rows", flush=True)
    start, results = time.perf_counter(), []
    with concurrent.futures.ThreadPoolExecutor(options.threads) as pool:
        steps = [pool.submit(Step, row) for row in todo]
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    if options.compile:
        return

    def add(row, step):
        found = measured(row, step)
        results.append(found)
        write(options.out, results, options.smoke)
        text = f"{found['ms']:.1f} ms" if "ms" in found else found["skipped"]
        print(f"[{time.perf_counter() - start:4.0f} s] {row.labels()}: {text}", flush=True)
        return found

    for row, step in zip(todo, steps, strict=True):
        if row.part == "largest" and (more := largest(row, step)) is not None:
            add(more, lambda more=more: Step(more))
    for row, step in zip(todo, steps, strict=True):
        add(row, step)
    scaling = write(options.out, results, options.smoke)
    print(table(results, scaling))


if __name__ == "__main__":
    main()
