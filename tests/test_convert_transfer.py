"""Whole checkpoints to saved models, onto meshes and back: exact, streamed, and nothing half-done left behind."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from checkpoints import assert_same_tree, read_checkpoint
from safetensors.numpy import load_file, save_file

import uhd_jax
from uhd_jax.checkpoint import Checkpointer, CheckpointError, SavedModel, load_model
from uhd_jax.config import MeshConfig, to_dict
from uhd_jax.convert import transfer, writer
from uhd_jax.convert.source import Source, open_source
from uhd_jax.convert.tables import SAME, TRANSPOSE, ConvertError, Entry, flatten, load, match
from uhd_jax.convert.transfer import export_model, import_model, load_params, recognise
from uhd_jax.convert.writer import whole_folder
from uhd_jax.models import uhd
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.sharding.rules import with_shardings

GOLDEN = Path(__file__).parent / "golden" / "v4_full_qwen3_16x"
FILES = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def abstract_of(config):
    return jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small checkpoint of MiniCPM-V 4.6's layout, in two shards' worth of bfloat16 values."""
    return make_checkpoint(tmp_path / "source")


def make_checkpoint(folder, **changes):
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(GOLDEN / name, folder / name)
    tensors = {name: tensor.astype(jnp.bfloat16) for name, tensor in load_file(GOLDEN / "model.safetensors").items()}
    save_file(tensors | changes, folder / "model.safetensors")
    return folder


def imported(source, destination, dtype="float32", **options):
    with open_source(source) as opened:
        import_model(opened, destination, recognise(opened, abstract_of), dtype, **options)
    return destination


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


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


def test_what_cannot_be_exported(checkpoint, tmp_path):
    made = imported(checkpoint, tmp_path / "made")
    for name, words in {
        "nothing": "family 'nothing' is not known",
        "vdim": "vdim holds connector/upsampler, which the model does not have",
        "llava_uhd_v2": "no entry in the table for:|the layout needs",
    }.items():
        with pytest.raises(ConvertError, match=words):
            export_model(made, tmp_path / "out", name)
    with pytest.raises(CheckpointError, match="holds no model"):
        export_model(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


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


def test_destinations_that_are_refused(checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = digest(checkpoint)
    for destination, words in {
        tmp_path / "full": "full is not empty",
        tmp_path / "file": "file is a file",
        checkpoint: "source lies in .*source, which is only read",
        tmp_path / os.fsdecode(b"ma\xffde"): "ma.*de' is not UTF-8; choose another name",
        checkpoint / "new": "new lies in .*source, which is only read",
    }.items():
        with pytest.raises(ConvertError, match=words):
            imported(checkpoint, destination)
    assert digest(checkpoint) == before and (tmp_path / "full" / "note.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    load_model(imported(checkpoint, tmp_path / "empty"))


@pytest.mark.parametrize("dtype", ["as-is", "float32"])
def test_too_small_a_disk_is_known_before(checkpoint, tmp_path, monkeypatch, dtype):
    usage, asked = shutil.disk_usage(tmp_path), []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage._replace(free=2**18))
    (tmp_path / "made").mkdir()
    with pytest.raises(ConvertError, match="made needs 0 MiB, only 0 MiB are free there"):
        imported(checkpoint, tmp_path / "made", dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]
    assert asked == [tmp_path]  # where `.made.partial` would be


def test_a_link_is_followed(checkpoint, tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    for name in ("real", "new"):
        (tmp_path / f"link to {name}").symlink_to(tmp_path / "disk" / name)
        load_model(imported(checkpoint, tmp_path / f"link to {name}"))
        assert (tmp_path / f"link to {name}").is_symlink() and (tmp_path / "disk" / name / "model.json").is_file()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["new", "real"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(ConvertError, match="cannot write .*circle"):
        imported(checkpoint, tmp_path / "circle")


def test_a_folder_that_cannot_be_replaced_is_refused_at_once(tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    monkeypatch.chdir(made)
    for name in (".", made, "../made"):
        with pytest.raises(ConvertError, match="made is the current folder and cannot be replaced; choose a new"):
            with whole_folder(name):
                pytest.fail("begins")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("os.path.ismount", lambda path: Path(path) == made)
        with pytest.raises(ConvertError, match="made is a mount point and cannot be replaced; choose a new folder in"):
            with whole_folder(made):
                pytest.fail("begins")
    lines = b"36 35 98:0 / %b rw - ext3 /dev/root rw\n" % bytes(tmp_path / "a disk").replace(b" ", rb"\040")
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: lines if path.name == "mountinfo" else read(path))
    with pytest.raises(ConvertError, match="a disk is a mount point"):
        with whole_folder(tmp_path / "a disk"):
            pytest.fail("begins")
    with whole_folder(made):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_only_what_is_full_is_said_in_other_words(tmp_path):
    full = CheckpointError("cannot write. Mend the folder's permissions. Cause: No space left on device")
    for error, words in {
        full: "made: No space left on device",
        CheckpointError("Cause: other"): "Cause: other",
    }.items():
        with pytest.raises((ConvertError, CheckpointError), match=words) as raised:
            with whole_folder(tmp_path / "made"):
                raise error
        assert "permissions" not in str(raised.value)
    assert not any(tmp_path.iterdir())


def test_two_at_once(tmp_path):
    with whole_folder(tmp_path / "made") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(ConvertError, match="made.partial is being written by another process"):
            with whole_folder(tmp_path / "made"):
                pass
    assert (tmp_path / "made" / "file").read_text() == "first"


def test_nothing_is_left_where_a_weight_is_not_finite(tmp_path):
    name = "model.language_model.layers.2.mlp.down_proj.weight"
    tensor = load_file(GOLDEN / "model.safetensors")[name].astype(jnp.bfloat16)
    tensor[3, 4] = np.nan
    source = make_checkpoint(tmp_path / "source", **{name: tensor})
    with pytest.raises(ConvertError, match=rf"{name} holds nan at \[3, 4\]"):
        imported(source, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["model.language_model.layers.2.mlp.down_proj.weight", "lm_head.weight"])
@pytest.mark.parametrize("value, theirs, dtype", [(1e300, "float64", "float32"), (3.4e38, "float32", "bfloat16")])
def test_a_weight_that_becomes_infinite_is_named(tmp_path, name, value, theirs, dtype):
    tensor = load_file(GOLDEN / "model.safetensors")[name].astype(theirs)
    tensor[3, 4] = value
    source = make_checkpoint(tmp_path / "source", **{name: tensor})
    with pytest.raises(ConvertError, match=rf"{name} holds .*e\+\d+ \({theirs}\), which {dtype} cannot"):
        imported(source, tmp_path / "made", dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    imported(source, tmp_path / "made", "as-is")
    with pytest.raises(ConvertError, match=rf"{name} holds .*e\+\d+ \({theirs}\), which {dtype} cannot"):
        export_model(tmp_path / "made", tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_that_is_not_finite_is_not_exported(tmp_path, value):
    params = jax.tree.map(np.array, tiny.random_params(jax.eval_shape(tiny.init_params, jax.random.key(0))))
    jax.tree.leaves(params["decoder"])[-1].flat[2] = value
    checkpointer = Checkpointer(tmp_path / "run")
    checkpointer.save(7, params, {"step": np.int32(7)}, {}, {"config": to_dict(tiny.run())})
    checkpointer.close()
    with pytest.raises(ConvertError, match=rf"run: \S+ \(float32\) would hold {value}; weights must be finite"):
        export_model(tmp_path / "run", tmp_path / "out", "llava_uhd_v4_research")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_does_not_fit_is_listed_before_anything_is_written(tmp_path):
    tensor = np.ones((2, 3), np.float32)
    source = make_checkpoint(
        tmp_path / "source", **{"extra.weight": tensor, "model.merger.mlp.0.linear_1.bias": tensor}
    )
    with pytest.raises(ConvertError) as raised:
        imported(source, tmp_path / "made")
    first, *problems = str(raised.value).splitlines()
    assert len(problems) == 2 and "unexpected extra.weight (2, 3)" in str(raised.value)
    assert "linear_1.bias has shape (2, 3), which does not give connector/round_0/linear_1/bias (128,)" in problems[0]
    integers = make_checkpoint(tmp_path / "integers", **{"model.merger.mlp.0.linear_1.bias": np.ones(128, np.int8)})
    with pytest.raises(ConvertError, match="linear_1.bias has dtype int8"):
        imported(integers, tmp_path / "made")


def test_a_part_alone_is_no_model(checkpoint, tmp_path, monkeypatch):
    with open_source(checkpoint) as source:
        found = recognise(source, abstract_of)
        alone = transfer.Recognised(
            functools.partial(type(found.family), **vars(found.family) | {"parts": ("tower",)})(), found.config, {}
        )
        with pytest.raises(ConvertError, match="holds tower only; uhd-jax convert combine"):
            import_model(source, tmp_path / "made", alone)


SCRIPT = """
import os, resource, signal, sys
import jax
from uhd_jax.convert.source import Source, open_source
from uhd_jax.convert.transfer import import_model, recognise
from uhd_jax.models import uhd

abstract_of = lambda config: jax.eval_shape(lambda: uhd.init_params(config, jax.random.key(0)))
read, count = Source.read, 0
"""


def child(code, *arguments):
    script = (
        SCRIPT
        + textwrap.dedent(code)
        + (
            "\nwith open_source(sys.argv[1]) as source:\n"
            "    import_model(source, sys.argv[2], recognise(source, abstract_of), 'as-is')\n"
        )
    )
    return subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)


def test_a_killed_import_leaves_nothing_that_loads(checkpoint, tmp_path):
    before = digest(checkpoint)
    done = child(
        """
        def dying(self, name):
            global count
            count += 1
            if count == 100:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(self, name)
        Source.read = dying
        """,
        checkpoint,
        tmp_path / "made",
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.partial", "source"]
    assert any((tmp_path / ".made.partial").rglob("*.ocdbt"))  # it was in the midst of it
    for folder in (tmp_path / "made", tmp_path / ".made.partial"):
        with pytest.raises(CheckpointError):
            load_model(folder)
    assert digest(checkpoint) == before
    load_model(imported(checkpoint, tmp_path / "made"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["model.json", "params", "tokenizer"]


def test_a_full_disk(checkpoint, tmp_path):
    """No file may grow beyond 8 KiB: writes fail as they do on a full disk."""
    code = "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
    done = child(code, checkpoint, tmp_path / "made")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "cannot write" in last and "MiB free there" in last and "File too large" in last
    assert "ulimit" in last and "permission" not in last and ".partial" not in last
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_disk_that_becomes_full_in_an_export(checkpoint, tmp_path, monkeypatch):
    made = imported(checkpoint, tmp_path / "made")
    before, written = digest(made / "tokenizer"), []

    def write(path, *arguments):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        whole(path, *arguments)

    whole = writer._write_file
    monkeypatch.setattr(writer, "_write_file", write)
    with pytest.raises(ConvertError, match="cannot write .*out: No space left on device .*what was written is removed"):
        export_model(made, tmp_path / "out", max_shard_bytes=100_000)
    assert written and sorted(path.name for path in tmp_path.iterdir()) == ["made", "source"]
    assert digest(made / "tokenizer") == before


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
