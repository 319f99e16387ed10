import numpy as np
import pytest
from scipy import ndimage

from flare_jax.solvers import parts, voxels


@pytest.mark.parametrize("family", parts.FAMILIES, ids=lambda family: family.__name__)
def test_every_family_draws_parts_that_can_be_built(family):
    voxel = parts.voxel_of(2.0, 5)
    per_layer = round(parts.LAYER / voxel[2])
    built = []
    for seed in range(8):
        shape, wall = family(np.random.default_rng(seed), 60.0)
        assert 0 < wall < 20
        drawn = parts.sample(shape, (0, 1, 2), (1, 1, 1), 60.0, voxel)
        solid = parts.standing(drawn, per_layer)
        if solid.any():
            assert solid[:, :, 0].any() and ndimage.label(solid)[1] == 1
            assert not voxels.unsupported(solid, per_layer).any()
        built.append(solid.sum() / drawn.sum())
    assert np.median(built) > 0.9


def test_candidates_depend_on_their_numbers_alone():
    a, b = (parts.candidate(3, 5, 1, "small") for _ in range(2))
    assert np.array_equal(a.solid, b.solid) and a[1:] == b[1:]
    others = [parts.candidate(*n, "small") for n in ((4, 5, 1), (3, 6, 1), (3, 5, 2))]
    assert not any(a.solid.shape == o.solid.shape and (a.solid == o.solid).all() for o in others)


@pytest.mark.parametrize("size, count", [("paper", 12), ("small", 40)])
def test_meshes_have_the_sizes_that_are_aimed_at(size, count):
    box, (_, most), *_ = parts.SIZES[size]
    drawn = [parts.candidate(0, index, 0, size) for index in range(count)]
    drawn = [part for part in drawn if part is not None]
    nodes = [len(voxels.mesh(part.solid).index) for part in drawn]
    assert len(drawn) > 0.8 * count
    assert 0.25 * most < np.median(nodes) < 0.85 * most
    for part in drawn:
        assert (np.array(part.solid.shape) * part.voxel <= box + 1e-6).all()
        assert max(part.voxel) < 3 * min(part.voxel)  # the published limit on element shapes
        assert (parts.LAYER / part.voxel[2]).is_integer()


def test_small_parts_follow_from_their_nodes():
    """No node hangs over, all voxels are alike, and the solid is what its nodes enclose."""
    drawn = [parts.candidate(1, index, 0, "small") for index in range(24)]
    drawn = [part for part in drawn if part is not None]
    assert len({part.family for part in drawn}) > 5 and len({part.voxel for part in drawn}) == 1
    for part in drawn:
        assert part.voxel[2] == parts.LAYER
        assert (part.solid[:, :, 1:] <= part.solid[:, :, :-1]).all()
        node = voxels.mesh(part.solid).number >= 0
        corners = np.lib.stride_tricks.sliding_window_view(node, (2, 2, 2)).all((-1, -2, -3))
        np.testing.assert_array_equal(part.solid, corners)


def test_overhangs_and_narrow_gaps_are_filled():
    solid = np.ones((5, 3, 2), bool)
    solid[1, :, 0] = False  # a tunnel
    solid[3] = False  # a slot of one voxel: its corners are nodes all the same
    np.testing.assert_array_equal(parts.filled(solid), np.ones((5, 3, 2), bool))
    wide = np.ones((6, 3, 2), bool)
    wide[2:4] = False
    np.testing.assert_array_equal(parts.filled(wide), wide)


def test_parts_are_turned_and_put_down():
    corner, voxel = parts.cuboid((0, 0, 0), (9, 4, 3)), (1.0, 1.0, 1.0)
    put = lambda axes, signs: parts.sample(corner, axes, signs, 20.0, voxel)
    upright = put((0, 1, 2), (1, 1, 1))
    assert np.argwhere(upright).max(0).tolist() == [18, 13, 2] and upright.sum() == 9 * 4 * 3
    np.testing.assert_array_equal(put((1, 0, 2), (1, 1, 1)), upright.transpose(1, 0, 2))
    np.testing.assert_array_equal(put((0, 1, 2), (-1, 1, 1)), upright[::-1])
    over, side = put((0, 1, 2), (1, 1, -1)), put((2, 1, 0), (1, 1, 1))
    assert over.shape == (20, 20, 3) and over.sum() == upright.sum()  # it was at the top
    assert np.ptp(np.argwhere(side), axis=0).tolist() == [2, 3, 8] and side[:, :, 0].any()


def test_shapes_are_combined():
    box, hole = parts.cuboid((-4, -4, 0), (4, 4, 5)), parts.cylinder((0, 0), 2.0, 2, -1, 6)
    inside = lambda shape, *place: bool(shape(*map(np.float64, place)) < 0)
    drilled = parts.cut(box, hole)
    assert (
        inside(drilled, 3, 0, 1) and not inside(drilled, 0, 0, 1) and not inside(drilled, 5, 0, 1)
    )
    assert inside(parts.union(drilled, hole), 0, 0, 5.5) and not inside(
        parts.common(box, hole), 3, 0, 1
    )
    assert inside(parts.strut((0, 0, 0), (4, 4, 4), 0.5), 2, 2, 2.3)
    assert inside(parts.cone((0, 0), 2, 0, 0, 4), 0.9, 0, 2) and not inside(
        parts.cone((0, 0), 2, 0, 0, 4), 1.1, 0, 2
    )


def test_what_hangs_in_the_air_is_dropped():
    solid = np.zeros((6, 1, 6), bool)
    solid[0] = solid[:, :, 4:] = True  # a gallows
    solid[4, 0, 1:3] = True  # floats
    solid[5, 0, 3] = True  # hangs from the arm
    loose = solid & voxels.unsupported(solid, 1)
    assert np.argwhere(loose).tolist() == [[4, 0, 1], [4, 0, 2], [5, 0, 3]]
    assert not voxels.unsupported(solid, 6)[5, 0, 3]  # comes together with the arm
    assert parts.standing(solid, 1).sum() == solid.sum() - 3


def test_a_size_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="one of paper, small, got 'huge'"):
        parts.candidate(0, 0, 0, "huge")
