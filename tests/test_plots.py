import numpy as np

from flare_jax.plots import curves_figure, plt, prediction_figure, samples_figure, triangles

ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)
RING = np.concatenate([[r * np.cos(ANGLES), r * np.sin(ANGLES)] for r in (0.8, 1.0)], axis=1).T


def test_triangles_leave_holes_open():
    mesh = triangles(RING, 0.3)
    (a, b, c) = RING[mesh.triangles[~mesh.mask]].swapaxes(0, 1)
    area = np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]).sum() / 2
    ring = 40 / 2 * np.sin(2 * np.pi / 40) * (1 - 0.8**2)  # between two polygons of 40 corners
    np.testing.assert_allclose(area, ring, rtol=0.01)  # filled, the hole would add 178 %


def test_titles_in_space_are_over_the_panels(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    x = np.random.default_rng(0).normal(size=(2, 9, 3))
    names = dict(inputs=("x", "y", "z"), targets=("u",))
    fields = x[..., :1], x[..., 1:2]
    prediction_figure(tmp_path / "a.png", x, *fields, **names, titles=["one", "two"], unit="mm")
    monkeypatch.undo()
    axes = np.array(figures[0].axes[:6]).reshape(2, 3)
    assert [axis.get_title() for axis in axes[:, 0]] == ["u: truth\none", "two"]
    assert [bar.get_ylabel() for bar in figures[0].axes[6:]] == ["mm"] * 6
    plt.close(figures[0])


def test_figures_are_written(tmp_path):
    values = np.stack([RING[:, 0], RING[:, 1]])
    samples_figure(tmp_path / "a.png", np.stack([RING, RING]), values, longest_edge=0.3)
    runs = {"a run": np.array([[1.0, 2.0], [0.1, 0.2]])}
    curves_figure(tmp_path / "b.png", np.arange(2.0), runs, labels=("x", "y"), levels=[0.5])
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
