"""Whole checkpoints to saved models, onto meshes and back: exact and streamed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checkpoints import assert_same_tree, read_checkpoint
from safetensors.numpy import load_file
from small46 import GOLDEN, abstract_of, digest, imported, make_checkpoint

import uhd_jax
from uhd_jax.checkpoint import Checkpointer, SavedModel, load_model
from uhd_jax.config import MeshConfig, to_dict
from uhd_jax.convert import transfer
from uhd_jax.convert.source import Source, open_source
from uhd_jax.convert.tables import SAME, TRANSPOSE, Entry, flatten, load, match
from uhd_jax.convert.transfer import export_model, import_model, load_params, recognise
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import with_shardings


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small checkpoint of MiniCPM-V 4.6's layout, in two shards' worth of bfloat16 values."""
    return make_checkpoint(tmp_path / "source")


@pytest.mark.parametrize("dtype, stored", [("float32", "float32"), ("bfloat16", "bfloat16"), ("as-is", "bfloat16")])
def test_an_import_is_what_the_table_says(checkpoint, tmp_path, dtype, stored):
    before = digest(checkpoint)
    params, config = load_model(imported(checkpoint, tmp_path / "made", dtype))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {stored}
    _, expected_config, expected = read_checkpoint(checkpoint)
    assert_same_tree(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params), expected)
    assert config.decoder == expected_config.decoder and config.tower == expected_config.tower
    assert config.chat.tokenizer == "tokenizer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]
    assert digest(checkpoint) == before


def test_an_import_answers_as_its_source(checkpoint, tmp_path, unoptimised):
    """Whose parameters are bfloat16 on disk and stay so in memory, where the source's become float32."""
    theirs, ours = uhd_jax.load(checkpoint), uhd_jax.load(imported(checkpoint, tmp_path / "made", "as-is"))
    prepared = theirs.prepare("What is this?", [np.zeros((60, 90, 3), np.uint8)])
    images = [np.zeros((60, 90, 3), np.uint8)]
    assert (ours.prepare("What is this?", images).token_ids == prepared.token_ids).all()
    expected = theirs.logits(prepared.token_ids, images)
    np.testing.assert_allclose(ours.logits(prepared.token_ids, images), expected, atol=1e-5, rtol=0)


def test_training_reads_bfloat16_as_float32_onto_its_mesh(checkpoint, tmp_path):
    made = imported(checkpoint, tmp_path / "made", "bfloat16")
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    target = with_shardings(abstract_of(SavedModel(made).config), mesh)
    params, _ = load_model(made, lambda on_disk: target)
    _, _, expected = read_checkpoint(checkpoint)
    assert_same_tree(jax.tree.map(np.asarray, params), expected)
    for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True):
        assert leaf.sharding == wanted.sharding and leaf.dtype == jnp.float32


def test_straight_onto_a_mesh(checkpoint):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    counted = []
    with open_source(checkpoint) as source:
        found = recognise(source, abstract_of)
        target = with_shardings(found.abstract, mesh)
        params = load_params(source, found, target, counted.append)
        assert sum(counted) == transfer.bytes_read(source, found.moves(source))
    _, _, expected = read_checkpoint(checkpoint)
    assert_same_tree(jax.tree.map(np.asarray, params), expected)
    gate, wanted = (tree["decoder"]["layers"]["mlp"]["gate"]["kernel"] for tree in (params, target))
    assert gate.sharding == wanted.sharding and gate.addressable_shards[0].data.size * 8 == gate.size


def test_there_and_back_is_bit_equal(checkpoint, tmp_path):
    for dtype in ("float32", "bfloat16"):
        done = export_model(
            imported(checkpoint, tmp_path / f"made {dtype}", dtype), tmp_path / dtype, dtype="bfloat16",
            max_shard_bytes=100_000,
        )  # fmt: skip
        assert (done.family, done.dtype, done.rounded) == ("minicpm_v_4_6", "bfloat16", 0)
        assert len(list((tmp_path / dtype).glob("*.safetensors"))) > 3
        assert all(file.stat().st_size <= 100_000 for file in (tmp_path / dtype).glob("*.safetensors"))
        theirs = load_file(checkpoint / "model.safetensors")
        with open_source(tmp_path / dtype) as source:
            assert set(source.tensors) == set(theirs)
            for name, tensor in theirs.items():
                assert source.tensors[name].dtype == tensor.dtype
                np.testing.assert_array_equal(source.read(name), tensor, err_msg=name)
            assert source.json("config.json")["dtype"] == "bfloat16"
            assert source.has("tokenizer.json")


def test_rounding_is_counted(tmp_path):
    source = make_checkpoint(
        tmp_path / "source", **{"lm_head.weight": load_file(GOLDEN / "model.safetensors")["lm_head.weight"]}
    )
    made = imported(source, tmp_path / "made", "as-is")
    assert export_model(made, tmp_path / "exact").rounded == 0  # float32, as the model computes
    done = export_model(made, tmp_path / "rounded", dtype="bfloat16")
    assert (done.rounded, done.tensors) == (1, 143)


def test_a_run_s_checkpoint_is_exported(tmp_path):
    params = jax.tree.map(np.asarray, tiny.random_params(jax.eval_shape(tiny.init_params, jax.random.key(0))))
    checkpointer = Checkpointer(tmp_path / "run")
    checkpointer.save(7, params, {"step": np.int32(7)}, {}, {"config": to_dict(tiny.run())})
    checkpointer.close()
    done = export_model(tmp_path / "run", tmp_path / "research", "llava_uhd_v4_research")
    assert done.dtype == "float32" and done.rounded == 0
    _, config, back = read_checkpoint(tmp_path / "research")
    assert_same_tree(back, params)


class Watched(Source):
    """Counts the tensors that are in memory."""

    live = most = 0

    def read(self, name):
        tensor = super().read(name)
        self.live += 1
        self.most = max(self.most, self.live)
        weakref.finalize(tensor if tensor.base is None else tensor.base, self._gone)
        return tensor

    def _gone(self):
        self.live -= 1


def test_one_foreign_tensor_is_in_memory_at_a_time(checkpoint, tmp_path, monkeypatch):
    """The next may be there before the last is let go."""
    monkeypatch.setattr("uhd_jax.checkpoint.models.TOGETHER", 0)
    with open_source(checkpoint) as source:
        watched = Watched(source.path, source.tensors)
        found = recognise(watched, abstract_of)
        import_model(watched, tmp_path / "made", found)
        assert watched.most == 2
        watched.most = 0
        load_params(watched, found, with_shardings(found.abstract, make_mesh(MeshConfig(data=1, fsdp=8))))
        assert watched.most == 2


@pytest.mark.parametrize("limit", [1, 100, 150, 10**3, 10**9])
@pytest.mark.parametrize(
    "shape, rule, stacked",
    [
        ((7, 5, 6), TRANSPOSE, True),
        ((5, 6), TRANSPOSE, False),
        ((7, 3), SAME, True),
        ((7,), SAME, True),
        ((), SAME, False),
    ],
)
def test_blocks_cover_everything_once(shape, rule, stacked, limit):
    random = np.random.default_rng(0)
    ours = random.normal(size=shape).astype(np.float32)
    theirs = (
        {f"l.{n}": layer for n, layer in enumerate(ours.swapaxes(-1, -2) if rule is TRANSPOSE else ours)}
        if stacked
        else {"w": ours.T}
    )
    table = [Entry("p", "l.{L}" if stacked else "w", rule)]
    (move,) = match(table, theirs, {"p": ours})
    seen = np.zeros(shape, int)
    chunk = move.block_shape(np.float64, limit)
    for place, block in move.blocks(theirs.__getitem__, np.float64, limit):
        assert block.dtype == np.float64 and block.flags.c_contiguous
        assert block.nbytes <= limit or block.shape[:1] in ((1,), ())
        np.testing.assert_array_equal(block, ours[place])
        seen[place] += 1
        assert all(part.start % size == 0 for part, size in zip(place, chunk, strict=False))
    assert (seen == 1).all()
    np.testing.assert_array_equal(load(move, theirs.__getitem__), ours)


def test_saved_models_read_one_parameter_at_a_time(checkpoint, tmp_path):
    made = imported(checkpoint, tmp_path / "made", "as-is")
    saved = SavedModel(made)
    _, _, expected = read_checkpoint(checkpoint)
    assert flatten(saved.tree).keys() == flatten(expected).keys()
    path = "decoder/layers/attention/query/kernel"
    found = saved.read(path)
    assert found.dtype == jnp.bfloat16 and found.shape == flatten(saved.tree)[path].shape
    np.testing.assert_array_equal(found.astype(np.float32), flatten(expected)[path])


def test_memory_does_not_grow_with_the_model(tmp_path):
    """192 MiB in 24 layers are written while the process grows by less than half of that."""
    script = """
    import resource, sys
    import numpy as np
    from uhd_jax.checkpoint import Streamed, save_model
    from uhd_jax.config import DecoderConfig, ModelConfig

    def blocks():
        for layer in range(24):
            yield (slice(layer, layer + 1),), np.full((1, 1024, 2048), layer, np.float32)

    def one(count):
        return Streamed((24, 1024, 2048), np.dtype(np.float32), (1, 1024, 2048), blocks)

    model = ModelConfig(DecoderConfig(8, 8, 8, 1, 1, 1, 8))
    small = Streamed((2,), np.dtype(np.float32), (2,), lambda: [((slice(0, 2),), np.ones(2, np.float32))])
    save_model(sys.argv[1] + "/small", {"a": small}, model)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_model(sys.argv[1] + "/large", {"a": one(0)}, model)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 96
    assert (SavedModel(tmp_path / "large").read("a") == np.arange(24)[:, None, None]).all()
