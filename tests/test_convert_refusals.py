"""Imports and exports that are refused, killed or out of room: said before where it can be, nothing half-done left."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from small46 import GOLDEN, abstract_of, digest, imported, make_checkpoint

from uhd_jax.checkpoint import Checkpointer, CheckpointError, load_model
from uhd_jax.config import to_dict
from uhd_jax.convert import transfer, writer
from uhd_jax.convert.source import open_source
from uhd_jax.convert.tables import ConvertError
from uhd_jax.convert.transfer import export_model, import_model, recognise
from uhd_jax.convert.writer import whole_folder


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a small checkpoint of MiniCPM-V 4.6's layout, in two shards' worth of bfloat16 values."""
    return make_checkpoint(tmp_path / "source")


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
