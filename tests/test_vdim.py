"""The reconstruction losses piece by piece: against torch, for any patch grid, and what is left to chance."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import (
    CompressorConfig,
    ConnectorConfig,
    DecoderConfig,
    ModelConfig,
    PyramidConfig,
    ReconstructionConfig,
    TowerConfig,
)
from uhd_jax.ops import neighbourhood as nb
from uhd_jax.ops.image_axes import bilinear_axis, blur_axis, jitter_axis
from uhd_jax.training.vdim import (
    down_sample,
    draw_jitter,
    init_scaffold,
    paper_loss,
    released_loss,
    released_terms,
)

pytestmark = pytest.mark.usefixtures("unoptimised")

MODEL = ModelConfig(
    decoder=DecoderConfig(64, 16, 16, 1, 2, 2, 8),
    tower=TowerConfig(width=6, mlp_width=8, layers=1, heads=2, patch_size=4, table_side=4),
    compressor=CompressorConfig("none"),
    connector=ConnectorConfig("hiwin", heads=2, query_side=2, pyramid=PyramidConfig(7)),
    dtype="float32",
)
GRIDS = [(3, 4), (1, 5), (5, 1), (1, 1), (0, 0)]
ROOM = 12
RELEASED = ReconstructionConfig("released", jitters=2, pad=3, projections=4, crf_pixels=20)


@functools.cache
def scaffold(form="released"):
    return init_scaffold(MODEL, form, jax.random.key(0))


def random_cells(seed, grids=GRIDS, room=ROOM):
    """Levels 0 to 2, in patch order; what lies behind a view differs with the room."""
    levels = []
    for level in range(3):
        cells = np.random.default_rng((seed, room)).normal(size=(len(grids), 4**level * room, 6))
        for view, (rows, cols) in enumerate(grids):
            own = 4**level * rows * cols
            cells[view, :own] = np.random.default_rng((seed, level, rows, cols)).normal(size=(own, 6))
        levels.append(jnp.asarray(cells, jnp.float32))
    return levels


down = jax.jit(down_sample, static_argnums=3)


@pytest.mark.parametrize("level", [1, 2])
def test_down_sampling_is_attention_over_the_pixels_of_the_enlarged_map(level):
    torch = pytest.importorskip("torch")
    parameters, side = scaffold()[f"level_{level}"], MODEL.tower.patch_size
    cells, grids = random_cells(0)[level], jnp.asarray(GRIDS, jnp.int32)
    made, raster = jax.device_get((down(parameters, cells, grids, level), nb.to_raster(cells, grids, level)))
    parameters = jax.device_get(parameters)
    for view, (rows, cols) in enumerate(GRIDS[:-1]):
        own = raster[view, : 4**level * rows * cols]
        maps = torch.from_numpy(own.T.reshape(1, 6, 2**level * rows, 2**level * cols).copy())
        large = torch.nn.functional.interpolate(maps, (side * rows, side * cols), mode="bilinear")[0].numpy()
        windows = large.reshape(6, rows, side, cols, side).transpose(1, 3, 2, 4, 0).reshape(rows * cols, side**2, 6)
        logits = (windows @ parameters["attention"]["kernel"])[..., 0] + parameters["attention"]["bias"]
        logits = logits * parameters["weight"].reshape(-1) + parameters["bias"].reshape(-1)
        weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        expected = np.einsum("pk,pkc->pc", weights, windows)
        np.testing.assert_allclose(made[view, : rows * cols], expected, atol=1e-5)


def test_the_papers_loss_is_half_the_squared_error_of_every_patch():
    cells, grids = random_cells(1), jnp.asarray(GRIDS, jnp.int32)
    target, expected = np.asarray(cells[0]), 0.0
    for level in (1, 2):
        made = np.asarray(down(scaffold()[f"level_{level}"], cells[level], grids, level))
        for view, (rows, cols) in enumerate(GRIDS):
            error = np.square(made[view, : rows * cols] - target[view, : rows * cols])
            expected += 0.5 * error.mean(axis=-1).sum()
    loss = jax.jit(paper_loss)
    total, weight = loss(scaffold("paper"), cells, grids)
    assert weight == sum(rows * cols for rows, cols in GRIDS)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    larger, _ = loss(scaffold("paper"), random_cells(1, room=ROOM + 3), grids)
    np.testing.assert_allclose(larger, total, rtol=1e-5)  # however much room there is behind the views
    assert "scale" not in scaffold("paper")["level_1"]


def test_jitter_is_torchs_padding_and_zoom_then_a_cut_and_a_flip():
    torch = pytest.importorskip("torch")
    size, pad, image = 12, 3, np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
    padded = torch.nn.functional.pad(torch.from_numpy(image)[None, None], [pad] * 4, mode="reflect")
    for zoom, row, col, flip in ((1.0, 0, 6, False), (1.0, 2, 3, True), (1.37, 11, 4, True), (1.9, 0, 22, False)):
        zoomed = padded
        if zoom > 1:
            zoomed = torch.nn.functional.interpolate(padded, scale_factor=zoom, mode="bilinear")
        expected = zoomed[0, 0, row : row + size, col : col + size].numpy()
        expected = expected[:, ::-1] if flip else expected
        assert expected.shape == (size, size)
        down = jitter_axis(size, pad, jnp.float32(zoom), jnp.int32(row), jnp.bool_(False))
        across = jitter_axis(size, pad, jnp.float32(zoom), jnp.int32(col), jnp.bool_(flip))
        np.testing.assert_allclose(down @ image @ across.T, expected, atol=1e-5)


def test_axes_keep_constants_and_blur_keeps_an_impulse_symmetric():
    for matrix in (bilinear_axis(12, 5), blur_axis(12), blur_axis(1)):
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    inner = blur_axis(12)[:, 6]
    np.testing.assert_allclose(inner[4:9], inner[4:9][::-1])
    np.testing.assert_allclose(inner[7] / inner[6], np.exp(-0.5), rtol=1e-5)
    assert (inner[4:9] > 0).all() and inner[:4].max() == inner[9:].max() == 0


def test_draws_stay_inside_their_ranges():
    draw = jax.jit(lambda key: draw_jitter(key, RELEASED, views=2, width=6, grid=4, size=16, levels=2))
    draws = [draw(jax.random.key(number)) for number in range(60)]
    for one in draws:
        room = int((16 + 2 * RELEASED.pad) * float(one.zoom)) - 16
        assert 1 <= one.zoom < RELEASED.zoom
        assert 0 <= one.row <= room and 0 <= one.col <= room
        for level in one.levels:
            assert 0 <= level.pixel_rows.min() and level.pixel_rows.max() < 16
            assert set(np.unique(level.channels)) <= {0.0, 1.25}
    assert 0.2 < np.mean([one.flip for one in draws]) < 0.8
    assert 0.2 < np.mean([one.zoom == 1 for one in draws]) < 0.8
    assert 0.75 < np.mean([one.levels[0].kept for one in draws]) < 0.85
    assert max(int(one.row) for one in draws) > 2 * RELEASED.pad  # zoomed images have more room
    assert not np.array_equal(draws[0].projection, draws[1].projection)


def released(scaffold, cells, patches, jitters=2):
    """The terms of views that fill a square, with a linear tower."""
    kernel = jax.random.normal(jax.random.key(5), (48, 6))
    draws = [
        draw_jitter(jax.random.key(number), RELEASED, views=len(patches), width=6, grid=2, size=8, levels=2)
        for number in range(jitters)
    ]
    return released_terms(scaffold, cells, patches, lambda pixels: pixels @ kernel, draws, RELEASED.pad)


def test_empty_slots_do_not_count_and_everything_has_a_gradient():
    grids = jnp.asarray([(2, 2), (0, 0), (2, 2)], jnp.int32)
    patches = jax.random.normal(jax.random.key(1), (3, 4, 48))

    def mean_loss(scaffold, cells):
        terms = released(scaffold, cells, patches)
        total, weight = released_loss(terms, grids, RELEASED.crf_weight)
        return total / weight, (weight, terms)

    step = jax.jit(jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True))
    (loss, (weight, terms)), gradient = jax.device_get(step(scaffold(), random_cells(3, [(2, 2)] * 3, room=4)))
    assert weight == 2
    of_view = sum(terms[f"reconstruction_{level}"] + RELEASED.crf_weight * terms[f"crf_{level}"] for level in (1, 2))
    np.testing.assert_allclose(loss, (of_view[0] + of_view[2]) / 2, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient[0]))
    for of_level in gradient[1][1:]:
        assert np.abs(of_level[0]).max() > 0 and np.abs(of_level[1]).max() == 0


def test_reconstruction_is_the_mean_over_jitters_and_crf_of_the_first_alone():
    cells, patches = random_cells(3, [(2, 2)], room=4), jax.random.normal(jax.random.key(1), (1, 4, 48))
    both, first = (jax.jit(lambda n=n: released(scaffold(), cells, patches, n))() for n in (2, 1))
    np.testing.assert_allclose(both["crf_1"], first["crf_1"], rtol=1e-5)
    assert abs(both["reconstruction_1"] - first["reconstruction_1"]) > 1e-3
    assert abs(both["reconstruction_1"] - first["reconstruction_1"]) < abs(first["reconstruction_1"])
