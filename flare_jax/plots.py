"""Figures: input, truth, prediction and error of a surrogate."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)

POSITIONS = ("x", "y", "z")
SIZE = 2.5  # inches of one panel


def prediction_figure(
    path: Path | str,
    x: Float[np.ndarray, "n N in"],
    prediction: Float[np.ndarray, "n N O"],
    truth: Float[np.ndarray, "n N O"] | None = None,
    *,
    inputs: Sequence[str],
    targets: Sequence[str],
    shape: tuple[int, ...] | None = None,
    titles: Sequence[str] = (),
) -> None:
    """Writes a picture with one row a sample: input, truth, prediction, error (first field).

    Args:
        path: of the image to write.
        x: raw inputs; columns named x, y (z) are positions.
        prediction, truth: fields in physical units; without truth there is no error.
        inputs, targets: names of the columns.
        shape: draw on this grid (the first axis is x) instead of as points.
        titles: one for each row.
    """
    positions = [i for i, name in enumerate(inputs) if name in POSITIONS]
    others = [i for i, name in enumerate(inputs) if name not in POSITIONS]
    panels = [(inputs[i], x[..., i], "cividis") for i in others[:1]]
    if truth is not None:
        panels.append((f"{targets[0]}: truth", truth[..., 0], "viridis"))
    panels.append((f"{targets[0]}: prediction", prediction[..., 0], "viridis"))
    if truth is not None:
        panels.append(("prediction - truth", (prediction - truth)[..., 0], "RdBu_r"))

    rows, columns = len(x), len(panels)
    figure, axes = plt.subplots(
        rows,
        columns,
        squeeze=False,
        figsize=(SIZE * 1.15 * columns, SIZE * rows),
        layout="constrained",
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
            image = draw(axis, x[row][:, positions], values[row], shape, colours, limits)
            figure.colorbar(image, ax=axis, shrink=0.8)
            if row == 0:
                axis.set_title(name)
        if row < len(titles):
            axes[row, 0].set_ylabel(titles[row])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(axis, positions, values, shape, colours, limits):
    """One field on a grid, or as coloured points in the plane of the first two positions."""
    style = dict(cmap=colours, vmin=limits[0], vmax=limits[1])
    axis.set(xticks=[], yticks=[], aspect="equal")
    if shape is not None:
        return axis.imshow(values.reshape(shape).T, origin="lower", **style)
    return axis.scatter(*positions.T[:2], c=values, s=4, linewidths=0, **style)
