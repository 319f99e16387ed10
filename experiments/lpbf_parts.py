"""Generated parts for powder bed fusion beside the published ones: statistics, pictures, time.

    python -m experiments.lpbf_parts --out FOLDER                              # all 1,390
    python -m experiments.lpbf_parts --out FOLDER --train 200 --test 50        # the same, fewer
    python -m experiments.lpbf_parts --out FOLDER --size small --train 24 --test 6    # on a CPU
    python -m experiments.lpbf_parts --out ONE --share 0 2     # every second part, on one GPU
    python -m experiments.lpbf_parts --out TWO --share 1 2     # the others, on another

FOLDER gets lpbf_parts_SIZE.json and a picture of twelve parts; the parts go into `--cache`, where
training finds them. Parts that are there already are read, not made: after both shares the first
command makes the record of all. Part i is the same in all of these but for `--size`, so that fewer
parts are a fair sample of all. After `--limit-seconds` no further part is begun, and the record
says how many were made. Pace and time are those of the parts made, all included: geometry,
equilibrium of all layers, checks, rejected candidates, files. Compilation is spent once, whatever
the number of parts, and partly side by side with solving. Stress is counted from the top of the
first layer on, as the limit on it is (`solvers/lpbf.py` says why). On a CPU that has other work,
OPENBLAS_NUM_THREADS=1 makes large parts several times as fast; small ones do so anyway.
"""

import collections
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Literal

import jax
import matplotlib
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from experiments import records, report
from flare_jax.problems import lpbf as problem
from flare_jax.solvers import lpbf

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from mpl_toolkits.mplot3d.art3d import Poly3DCollection  # noqa: E402

PUBLISHED = report.published()["lpbf_parts"]["statistics"]
STATISTICS = {
    "mean": np.mean,
    "std": np.std,
    "min": np.min,
    "median": np.median,
    "max": np.max,
}
MAGNIFIED = 20  # displacement in the picture
COLUMNS, PICTURED = 4, 12
COMPILATION = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Options:
    """Generates parts as the LPBF data set has them, and compares their statistics."""

    out: Path  # folder for the record and the picture
    train: int = 1100  # training parts, the first indices
    test: int = 290  # test parts, those after
    size: Literal["paper", "small"] = "paper"  # of the meshes
    seed: int = 0  # of the data set
    share: tuple[int, int] = (0, 1)  # K N: parts K, K + N, ... of each split only
    limit_seconds: float = math.inf  # stop after this time
    cache: Path | None = None  # folder for the parts; None: $FLARE_JAX_CACHE or user cache


class Seen:
    """What is kept of the parts that were read or made."""

    def __init__(self):
        self.rows: list[list[float]] = []  # as in PUBLISHED
        self.seconds: list[float] = []  # until each part that was made
        self.pictured: list[lpbf.PartMesh] = []
        self.rejected: collections.Counter = collections.Counter()

    def add(self, part: lpbf.PartMesh) -> None:
        sizes = len(part.pos), part.edge_index.shape[1]
        self.rows.append([*sizes, part.disp[:, 2].max(), lpbf.largest_stress(part)])
        self.rejected.update(part.rejected)
        families = collections.Counter(family(p) for p in self.pictured)
        if families[family(part)] < 2 and len(self.pictured) < PICTURED:
            self.pictured.append(part)


def family(part: lpbf.PartMesh) -> str:
    return part.name.split("_")[-1]


def asked(options: Options) -> list[Path]:
    """Files of the parts, of this share."""
    folder, share = problem.generated_folder(config(options)), options.share
    counts = {"train": options.train, "test": options.test}
    return [p for s, n in counts.items() for p in problem.part_paths(folder, s, n, share)]


def config(options: Options) -> problem.LPBFConfig:
    return problem.LPBFConfig(size=options.size, data_seed=options.seed, cache=options.cache)


def read(path: Path) -> lpbf.PartMesh:
    """A part that `make_missing` wrote."""
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(file["_metadata"][0])["metadata"]
        arrays = {name: file[name] for name in file.files if name != "_metadata"}
    return lpbf.PartMesh(about["case_id"], **arrays, rejected=tuple(about["rejected"]))


def seen(options: Options) -> Seen:
    """Reads the parts that are there and makes the others, or as many as the time allows."""
    result, make = Seen(), config(options)
    for path in asked(options):
        if path.exists():
            result.add(read(path))
    folder, began = problem.generated_folder(make), time.perf_counter()
    for split in ("train", "test"):
        count = getattr(options, split)
        stream = problem.make_missing(make, folder, split, count, share=options.share)
        for part in stream:
            result.add(part)
            result.seconds.append(time.perf_counter() - began)
            if len(result.seconds) % 25 == 0:
                print(f"{len(result.seconds)} parts in {result.seconds[-1]:.0f} s", flush=True)
            if result.seconds[-1] > options.limit_seconds:
                stream.close()
                return result
    return result


def statistics(rows: list[list[float]]) -> list[dict]:
    """Each quantity, its published statistics and ours."""
    return [
        {
            "quantity": name,
            "published": published,
            "ours": {key: float(f(column)) for key, f in STATISTICS.items()},
        }
        for (name, published), column in zip(
            PUBLISHED.items(), np.array(rows, float).T, strict=True
        )
    ]


def pace(seconds: list[float]) -> dict:
    """Parts a second over all that were made, and over their last half, which compiles little."""
    if not seconds:
        return {}
    half = len(seconds) // 2
    later = seconds[-1] - seconds[half - 1] if half else seconds[-1]
    return {
        "parts_per_second": len(seconds) / seconds[-1],
        "parts_per_second_last_half": (len(seconds) - half) / later,
    }


def show(rows: list[dict], facts: dict, seconds: float) -> None:
    table = Table("quantity", "", *STATISTICS)
    for row in rows:
        for source in ("published", "ours"):
            values = [row[source].get(key) for key in STATISTICS]
            text = ["" if v is None else f"{v:,.0f}" if v >= 100 else f"{v:.3f}" for v in values]
            table.add_row(row["quantity"] if source == "published" else "", source, *text)
    console = Console()
    console.print(table)
    reasons = ", ".join(f"{n} {why}" for why, n in sorted(facts["rejected"].items())) or "none"
    text = f"{facts['parts']} of {facts['asked']} parts, {facts['made']} of them made now"
    if facts["made"]:
        text += (
            f", in {seconds:.0f} s: {facts['parts_per_second']:.2f} a second, "
            f"in the last half {facts['parts_per_second_last_half']:.2f}; "
            f"{facts['compile_seconds']:.0f} s of compilation"
        )
    console.print(f"{text}; rejected: {reasons}")


# -------------------------------------------------------------------------- picture ---


def surface(elems: np.ndarray) -> np.ndarray:
    """Faces that belong to one hexahedron only, counterclockwise seen from outside."""
    faces = [[0, 3, 2, 1], [4, 5, 6, 7], [0, 1, 5, 4], [1, 2, 6, 5], [2, 3, 7, 6], [3, 0, 4, 7]]
    quads = elems[:, faces].reshape(-1, 4)
    _, first, count = np.unique(np.sort(quads, 1), axis=0, return_index=True, return_counts=True)
    return quads[first[count == 1]]


def draw(axis, part: lpbf.PartMesh) -> None:
    """The part in its magnified deformed shape, coloured by its vertical displacement."""
    view = np.array([np.cos(np.pi / 6) * c for c in (0.5, -np.sqrt(0.75))] + [0.5])  # towards us
    light = np.array([-0.3, -0.5, 0.81])
    quads = surface(part.elems)
    corners = (part.pos + MAGNIFIED * part.disp)[quads]  # [q, 4, 3]
    normal = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    seen = normal @ view > 0
    uz = part.disp[:, 2]
    colour = plt.get_cmap("viridis")(plt.Normalize(uz.min(), uz.max())(uz[quads].mean(1)))
    colour[:, :3] *= (0.6 + 0.4 * np.clip(normal @ light, 0, 1))[:, None]
    axis.add_collection3d(
        Poly3DCollection(
            corners[seen], facecolors=colour[seen], edgecolors=colour[seen], linewidths=0.1
        )
    )
    low, high = corners.min((0, 1)), corners.max((0, 1))
    middle, half = (low + high) / 2, (high - low).max() / 2
    axis.set(**{f"{c}lim": (m - half, m + half) for c, m in zip("xyz", middle, strict=True)})
    axis.set_box_aspect((1, 1, 1), zoom=1.02)
    axis.view_init(elev=30, azim=-60)
    axis.set_axis_off()
    axis.set_title(
        f"{family(part)}, {len(uz):,} nodes\n{uz.min():.2f} to {uz.max():.2f} mm",
        fontsize=8,
        y=0.97,
    )


def picture(path: Path, parts: list[lpbf.PartMesh]) -> None:
    rows = -(-len(parts) // COLUMNS)
    figure = plt.figure(figsize=(3 * COLUMNS, 3.1 * rows))
    for i, part in enumerate(parts, 1):
        draw(figure.add_subplot(rows, COLUMNS, i, projection="3d"), part)
    figure.suptitle(
        f"Vertical displacement after the last layer, dark (low) to bright (high); shapes move "
        f"{MAGNIFIED} times as far",
        fontsize=9,
    )
    figure.subplots_adjust(0, 0, 1, 0.9, 0, 0.15)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(options: Options, arguments: list[str] | None = None) -> None:
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event == COMPILATION else None
    )
    if not asked(options):
        raise ValueError(
            f"share {options.share} of {options.train} and {options.test} parts is empty"
        )
    began, result = time.perf_counter(), seen(options)
    rows = statistics(result.rows)
    note, found = "stress is counted from the top of the first layer on", len(result.rows)
    if (there := found - len(result.seconds)) > 0:  # by other calls, untimed
        note += f"; {there} of the parts were there already"
    facts = {
        "size": options.size,
        "seed": options.seed,
        "precision": "float64",
        "solver_version": lpbf.VERSION[options.size],
        "inherent_strain": lpbf.STRAIN,
        "note": note,
        "asked": len(asked(options)),
        "parts": found,
        "made": len(result.seconds),
        "rejected": dict(result.rejected),
        "compile_seconds": sum(compiled),
        **pace(result.seconds),
    }
    path = options.out / f"lpbf_parts_{options.size}.json"
    seconds = result.seconds[-1] if result.seconds else time.perf_counter() - began
    command = records.command("lpbf_parts", arguments)
    records.write(path, rows, command=command, seconds=seconds, **facts)
    picture(path.with_suffix(".png"), result.pictured)
    show(rows, facts, seconds)


if __name__ == "__main__":
    main(tyro.cli(Options))
