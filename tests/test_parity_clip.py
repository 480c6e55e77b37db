"""The CLIP tower against the stored outputs of v1's and v2's PyTorch modules, and against transformers' own, alive."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uhd_jax.config import TowerConfig
from uhd_jax.convert.tables import import_tensors
from uhd_jax.convert.towers import clip_tower_table
from uhd_jax.models.clip import ClipTower

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "b_clip_interp.npz"))
GRIDS = [(4, 4), (3, 5), (6, 2), (1, 16)]
ROOM = 18
CONFIG = TowerConfig(
    kind="clip", width=32, mlp_width=64, layers=3, heads=4, table_side=4, norm_eps=1e-5, skipped_layers=1
)
TOLERANCE = 2e-5


def _params(tensors: dict[str, np.ndarray], prefix: str) -> dict:
    init = ClipTower(CONFIG).init
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), jnp.zeros((1, 4, 588)), jnp.ones((1, 2), int), levels=0))
    return import_tensors(clip_tower_table(CONFIG, prefix), tensors, {"tower": shapes["params"]})["tower"]


def _padded(images: list[np.ndarray]) -> jnp.ndarray:
    """Images [1, 3, H, W] -> float32[V, ROOM, 588] in raster order; noise behind them."""
    out = np.random.default_rng(0).normal(size=(len(images), ROOM, 588)).astype(np.float32)
    for view, image in zip(out, images, strict=True):
        _, _, height, width = image.shape
        cut = image.reshape(3, height // 14, 14, width // 14, 14).transpose(1, 3, 0, 2, 4)
        view[: height * width // 196] = cut.reshape(-1, 588)
    return jnp.asarray(out)


@pytest.fixture(scope="module")
def params():
    return _params({n[3:]: tensor for n, tensor in GOLDEN.items() if n.startswith("sd/")}, "vision_model.")


@pytest.fixture(scope="module")
def run(params):
    """Features and taps of all four grids in one batch."""
    patches = _padded([GOLDEN[f"x_{rows}x{cols}"] for rows, cols in GRIDS])
    return ClipTower(CONFIG).apply({"params": params}, patches, jnp.array(GRIDS), levels=0, collect=True)


@pytest.mark.parametrize("number, grid", [*enumerate(GRIDS)], ids=str)
def test_every_stored_array(params, run, number, grid):
    features, taps = run
    name, count = f"{grid[0]}x{grid[1]}", grid[0] * grid[1]
    blank = jnp.zeros((len(GRIDS), ROOM, 588))  # no bias: a blank patch leaves its position
    _, bare = ClipTower(CONFIG).apply({"params": params}, blank, jnp.array(GRIDS), levels=0, collect=True)
    positions = bare["embeddings"].at[:, 0].add(-params["class_token"])
    for ours, theirs in (
        (positions[number, : 1 + count], "pos"),
        (taps["embeddings"][number, : 1 + count], "emb"),
        (features[number, :count], "feat"),
        (taps["layers_before"][-1, number, 1 : 1 + count], "feat"),
    ):
        np.testing.assert_allclose(ours, GOLDEN[f"{theirs}_{name}"][0], atol=TOLERANCE, rtol=0, err_msg=theirs)


def test_the_padded_and_masked_batch_of_v2(run):
    for number, (rows, cols) in enumerate(GOLDEN["v2_batch_sizes"].tolist()):
        assert (rows, cols) == GRIDS[number]
        theirs = GOLDEN["v2_batch_hidden_m2_nocls"][number, : rows * cols]
        np.testing.assert_allclose(run[0][number, : rows * cols], theirs, atol=TOLERANCE, rtol=0)


def test_live():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, image_size=56, patch_size=14)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
        images = [torch.randn(1, 3, 14 * rows, 14 * cols) for rows, cols in GRIDS]
        expected = [
            theirs(image, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-2]
            for image in images
        ]
    tensors = {f"x.{n.removeprefix('vision_model.')}": tensor.numpy() for n, tensor in theirs.state_dict().items()}
    patches = _padded([image.numpy() for image in images])
    ours, _ = ClipTower(CONFIG).apply({"params": _params(tensors, "x.")}, patches, jnp.array(GRIDS), levels=0)
    for view, hidden in zip(ours, expected, strict=True):
        hidden = hidden[0, 1:].numpy()
        assert np.abs(hidden).max() > 1
        np.testing.assert_allclose(view[: len(hidden)], hidden, atol=TOLERANCE, rtol=0)
