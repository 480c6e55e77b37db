"""Pickled weights: refused, then read by torch in a process of its own, which runs nothing they hold."""

from __future__ import annotations

import errno
import hashlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from uhd_jax.convert import pickles
from uhd_jax.convert.scratch import PREFIX, Scratch, remove_leftovers
from uhd_jax.convert.source import open_source
from uhd_jax.convert.tables import ConvertError

torch = pytest.importorskip("torch")
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2], dtype=torch.bfloat16)}
TENSORS["view"] = TENSORS["a.weight"].T  # shares its memory, and lies otherwise


class Evil:
    """Would make a file as it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_refused_without_leave(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ConvertError, match="pytorch_model.bin is a pickle, .* add --allow-pickle"):
            open_source(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_read_with_leave(tmp_path, capfd, legacy):
    file = tmp_path / "model.pt"
    lightning = {"state_dict": TENSORS, "epoch": 3, "hyper_parameters": {"lr": 0.1}}
    torch.save(lightning if legacy else TENSORS, file, _use_new_zipfile_serialization=not legacy)
    before = file.read_bytes()
    with open_source(file, allow_pickle=True) as source:
        assert set(source.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert source.tensors[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(source.read(name).astype(np.float32), tensor.float().numpy())
        scratch = source.tensors["b"].file
        assert scratch.exists() and tmp_path not in scratch.parents
    assert not scratch.exists() and file.read_bytes() == before
    printed = capfd.readouterr().err
    assert f"sha256 {hashlib.sha256(before).hexdigest()}  {file}" in printed
    assert ("left out of model.pt: epoch, hyper_parameters" in printed) == legacy


def test_shards_and_what_a_trainer_leaves_beside_them(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"training": Evil(tmp_path / "evil")}, tmp_path / "training_args.bin")
    with pytest.raises(ConvertError, match="shards are missing: pytorch_model-00002-of-00002.bin"):
        open_source(tmp_path, allow_pickle=True)
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    with open_source(tmp_path, allow_pickle=True) as source:
        assert {name: info.shape for name, info in source.tensors.items()} == {"a": (2,), "b": (3,)}
    assert not (tmp_path / "evil").exists()


def test_what_a_killed_process_left_is_removed(tmp_path, monkeypatch):
    """By the next; what another process is at work with stays."""
    temporary = tmp_path / "tmp"
    (temporary / f"{PREFIX}killed" / "0").mkdir(parents=True)
    (temporary / f"{PREFIX}killed" / "0" / "model.safetensors").write_bytes(b"half")
    (temporary / "uhd-jax-mine").mkdir()
    used = Scratch(temporary)
    assert not (temporary / f"{PREFIX}killed").exists()
    monkeypatch.setenv("TMPDIR", str(temporary))
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with open_source(tmp_path / "pytorch_model.bin", allow_pickle=True) as source:
        assert source.read("a").tolist() == [1, 1]
        assert len(list(temporary.iterdir())) == 3
    assert {path.name for path in temporary.iterdir()} == {"uhd-jax-mine", used.path.name}
    code = (
        "import os, signal, sys; from uhd_jax.convert.scratch import Scratch; "
        "made = Scratch(sys.argv[1]); print(made.path.name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(temporary)], capture_output=True, text=True)
    assert (temporary / done.stdout.strip()).is_dir() and done.returncode < 0
    remove_leftovers(temporary)
    assert not (temporary / done.stdout.strip()).exists() and used.path.is_dir()
    used.cleanup()
    assert [path.name for path in temporary.iterdir()] == ["uhd-jax-mine"]


def test_what_would_run_is_not_run(tmp_path):
    torch.save({"a": torch.ones(2), "b": Evil(tmp_path / "evil")}, tmp_path / "model.ckpt")
    with pytest.raises(
        ConvertError, match=r"model.ckpt: .*\(weights_only=True\) refuses it: it names \S*open,"
    ) as raised:
        open_source(tmp_path / "model.ckpt", allow_pickle=True)
    assert "False" not in str(raised.value)
    assert not (tmp_path / "evil").exists()


def test_damaged(tmp_path):
    file = tmp_path / "model.bin"
    torch.save(TENSORS, file)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(ConvertError, match=r"torch.load\(weights_only=True\) refuses it"):
        pickles._main(file, tmp_path)


class Other:
    """Is no tensor."""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_advice_to_read_it_all_the_same(tmp_path):
    file = tmp_path / "model.bin"
    torch.save({"a": Other()}, file)
    with pytest.raises(ConvertError, match=r"refuses it: it names \S+\.Other, which is no tensor") as raised:
        pickles._main(file, tmp_path)
    assert "safe_globals" not in str(raised.value)
    file.write_bytes(pickle.dumps({"a": Other()}, 4))
    with pytest.raises(ConvertError, match="refuses it: UnpicklingError: Unsupported operand 149"):
        pickles._main(file, tmp_path)


def test_empty(tmp_path):
    (tmp_path / "model.bin").touch()
    for allow in (False, True):
        with pytest.raises(ConvertError, match="model.bin is empty: download it again"):
            open_source(tmp_path / "model.bin", allow)


@pytest.mark.parametrize("legacy", [False, True])
def test_another_ending(tmp_path, legacy):
    torch.save(TENSORS, tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConvertError, match="model.pth is a pickle, .* add --allow-pickle"):
        open_source(tmp_path)
    (tmp_path / "model.pth").rename(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ConvertError, match="this is a pickle, no safetensors file; name it model.bin"):
            open_source(path, allow_pickle=True)


def test_temporary_folders_without_room(tmp_path, monkeypatch):
    file = tmp_path / "model.bin"
    torch.save({"a": torch.ones(2**20)}, file)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(ConvertError, match="cannot unpickle .*model.bin into .*none: No such file .* set TMPDIR to"):
        open_source(file, allow_pickle=True)
    (tmp_path / "made").mkdir()
    monkeypatch.setattr(pickles, "disk_usage", lambda path: shutil.disk_usage(path)._replace(free=2**21))
    with pytest.raises(ConvertError, match=rf"need 4.0 MiB in {tmp_path}; set TMPDIR .*\(2.0 MiB are free there\)"):
        pickles._main(file, tmp_path / "made")
    monkeypatch.undo()

    def full(folder, items):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pickles, "write_safetensors", full)
    with pytest.raises(ConvertError, match=rf"need 4.0 MiB in {tmp_path}; set TMPDIR .*No space left on device"):
        pickles._main(file, tmp_path / "made")


def test_a_type_that_safetensors_or_numpy_lacks(tmp_path):
    torch.save({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "model.bin")
    with pytest.raises(
        ConvertError, match="model.bin: a is complex64, torch.strided; known are dense tensors of float"
    ):
        open_source(tmp_path / "model.bin", allow_pickle=True)


def test_torch_is_missing(tmp_path, monkeypatch):
    torch.save(TENSORS, tmp_path / "model.bin")
    (tmp_path / "torch.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ConvertError, match="reading a pickle needs PyTorch, here alone: pip install torch"):
        open_source(tmp_path / "model.bin", allow_pickle=True)


@pytest.mark.parametrize(
    "value, words",
    [
        ([1], "holds no state dict, but list"),
        ({}, "holds no state dict"),
        ({"a": torch.ones(2), "step": 3}, "its state dict holds what is no tensor: step"),
        ({"state_dict": {"a": torch.ones(2), 7: torch.ones(2)}}, "what is no tensor: 7"),
    ],
)
def test_what_is_no_state_dict(value, words):
    with pytest.raises(ConvertError, match=words):
        pickles.tensors_of(value)
