"""Figures: samples; input, truth, prediction and error of a surrogate; curves; spectra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.tri import Triangulation  # noqa: E402

POSITIONS = ("x", "y", "z")
SIZE = 2.5  # inches of one panel
MOST_POINTS = 20_000  # drawn in space


def prediction_figure(
    path: Path | str,
    x: Sequence[Float[np.ndarray, "N in"]],
    prediction: Sequence[Float[np.ndarray, "N O"]],
    truth: Sequence[Float[np.ndarray, "N O"]] | None = None,
    *,
    inputs: Sequence[str],
    targets: Sequence[str],
    shape: tuple[int, ...] | None = None,
    titles: Sequence[str] = (),
    longest_edge: float | None = None,
    displacement: Float[np.ndarray, "n N S"] | None = None,
    unit: str = "",
) -> None:
    """Writes a picture with one row a sample: input, truth, prediction, error (first field).

    Args:
        path: of the image to write.
        x: raw inputs; columns named x, y (z) are positions. Samples may differ in size.
        prediction, truth: fields in physical units; without truth there is no error.
        inputs, targets: names of the columns.
        shape: draw on this grid (the first axis is x) instead of as points.
        titles: one for each row.
        longest_edge: without a grid, fill the triangles between points that are no further apart.
        displacement: draw those triangles where this moves their points.
        unit: of the first field.
    """
    positions = [i for i, name in enumerate(inputs) if name in POSITIONS]
    others = [i for i, name in enumerate(inputs) if name not in POSITIONS]
    column = lambda samples, i=0: [sample[:, i] for sample in samples]
    panels = [(inputs[i], column(x, i), "cividis") for i in others[:1]]
    if truth is not None:
        panels.append((f"{targets[0]}: truth", column(truth), "viridis"))
    panels.append((f"{targets[0]}: prediction", column(prediction), "viridis"))
    if truth is not None:
        errors = [p - t for p, t in zip(column(prediction), column(truth), strict=True)]
        panels.append(("prediction - truth", errors, "RdBu_r"))

    rows, columns = len(x), len(panels)
    figure, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(SIZE * 1.15 * columns, SIZE * rows),
        layout="constrained",
        subplot_kw={"projection": "3d"} if len(positions) == 3 else {},
    )
    for row in range(rows):
        fields = [values[row] for name, values, _ in panels if name.startswith(targets[0])]
        low, high = min(f.min() for f in fields), max(f.max() for f in fields)
        for axis, (name, values, colours) in zip(axes[row], panels, strict=True):
            limits = (values[row].min(), values[row].max())
            if name.startswith(targets[0]):
                limits = (low, high)  # truth and prediction share one scale
            elif colours == "RdBu_r":
                limits = (-np.abs(values[row]).max(), np.abs(values[row]).max())
            place = x[row][:, positions]
            moved = None if displacement is None else place + displacement[row]
            image = draw(axis, place, values[row], shape, colours, limits, longest_edge, moved)
            bar = figure.colorbar(image, ax=axis, shrink=0.8)
            if unit and name not in inputs:
                bar.set_label(unit)
            if row == 0:
                axis.set_title(name)
        if row < len(titles) and len(positions) == 3:
            over_row(axes[row], titles[row])
        elif row < len(titles):
            axes[row, 0].set_ylabel(titles[row])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def over_row(axes: Sequence, title: str) -> None:
    """Puts a row's title over its first panel, below the names of the columns."""
    for axis, text in zip(axes, (title, *[" "] * (len(axes) - 1)), strict=True):
        axis.set_title("\n".join(filter(None, (axis.get_title(), text))), fontsize="medium")


def samples_figure(
    path: Path | str,
    points: Float[np.ndarray, "n N 2"],
    values: Float[np.ndarray, "n N"],
    *,
    longest_edge: float,
    columns: int = 3,
) -> None:
    """Writes a picture of samples on points of the plane, each with its own colour scale."""
    rows = -(-len(points) // columns)
    size = (SIZE * 1.15 * columns, SIZE * rows)
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, place, value in zip(axes.flat, points, values, strict=False):
        limits = value.min(), value.max()
        image = draw(axis, place, value, None, "viridis", limits, longest_edge)
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves_figure(
    path: Path | str,
    x: Float[np.ndarray, "n"],
    curves: Mapping[str, Float[np.ndarray, "n runs"]],
    *,
    labels: tuple[str, str],
    levels: Sequence[float] = (),
) -> None:
    """Writes the mean of several runs over x, with a band from the smallest to the largest.

    `labels` are those of the axes; `levels` are drawn as horizontal lines. The y axis is
    logarithmic.
    """
    figure, axis = plt.subplots(figsize=(2.4 * SIZE, 1.6 * SIZE), layout="constrained")
    for name, runs in curves.items():
        (line,) = axis.plot(x, runs.mean(1), label=name)
        axis.fill_between(x, runs.min(1), runs.max(1), color=line.get_color(), alpha=0.25, lw=0)
    for level in levels:
        axis.axhline(level, color="0.6", lw=0.8, ls="--", zorder=0)
        axis.annotate(
            f"{level:.2%}", (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    axis.set(xlabel=labels[0], ylabel=labels[1], yscale="log")
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(axis, positions, values, shape, colours, limits, longest_edge=None, moved=None):
    """One field on a grid, on triangles of the plane, or as points of the plane or of space."""
    style = dict(cmap=colours, vmin=limits[0], vmax=limits[1])
    if axis.name == "3d":
        return draw_in_space(axis, positions, values, style)
    axis.set(xticks=[], yticks=[], aspect="equal")
    if shape is not None:
        return axis.imshow(values.reshape(shape).T, origin="lower", **style)
    if longest_edge is not None:
        mesh = triangles(positions, longest_edge)
        place = positions if moved is None else moved
        mesh = Triangulation(*place.T[:2], mesh.triangles, mesh.mask)
        return axis.tripcolor(mesh, values, shading="gouraud", **style)
    area = np.clip(4000 / len(positions), 0.5, 16)  # of a marker: they cover a panel about equally
    return axis.scatter(*positions.T[:2], c=values, s=area, linewidths=0, **style)


def draw_in_space(axis, positions, values, style):
    """Points of space, at most MOST_POINTS of them, seen from above a corner."""
    keep = slice(None, None, -(-len(positions) // MOST_POINTS))
    place = positions[keep]
    area = np.clip(20_000 / len(place), 1.5, 30)
    axis.set_axis_off()
    image = axis.scatter(*place.T, c=values[keep], s=area, linewidths=0, depthshade=False, **style)
    low, high = place.min(0), place.max(0)
    axis.set_box_aspect(np.maximum(high - low, 0.05 * (high - low).max()) + 1e-12, zoom=1.1)
    return image


def triangles(points: Float[np.ndarray, "N S"], longest_edge: float) -> Triangulation:
    """Triangles between points of the plane, but for those with a longer edge: holes stay open."""
    mesh = Triangulation(*points.T[:2])
    corners = points[mesh.triangles, :2]  # [T, 3, 2]
    edges = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1)
    mesh.set_mask(edges.max(1) > longest_edge)
    return mesh


def spectra_figure(
    path: Path | str,
    eigenvalues: Float[np.ndarray, "L n H M"],
    floor: float,
    *,
    title: str = "",
) -> None:
    """Writes a picture with one panel a block: eigenvalues of each head, largest first.

    Args:
        path: of the image to write.
        eigenvalues: of L blocks on n samples; a line is the median over samples.
        floor: below it everything is round-off; drawn as a band, values there are not drawn.
        title: of the whole picture.
    """
    blocks, _, heads, latents = eigenvalues.shape
    columns = min(blocks, 4)
    rows = -(-blocks // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(SIZE * 1.2 * columns + 0.5, SIZE * rows + 0.4),
        layout="constrained",
    )
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, heads))
    lowest = max(floor, 1e-17)
    for number, axis in enumerate(axes.flat):
        if number >= blocks:
            axis.set_axis_off()
            continue
        for values, colour in zip(np.median(eigenvalues[number], 0), colours, strict=True):
            seen = values > lowest
            axis.semilogy(np.arange(1, latents + 1)[seen], values[seen], ".-", color=colour, ms=3)
        axis.axhspan(lowest / 10, lowest, color="0.85", linewidth=0)
        axis.set(title=f"block {number + 1}", ylim=(lowest / 10, 3))
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("eigenvalue")
    figure.supxlabel("number (one line a head; grey: round-off)", fontsize="medium")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
