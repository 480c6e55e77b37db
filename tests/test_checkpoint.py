"""Saving, restoring, refusing."""

import dataclasses
import gc
import itertools
import json
import logging
import shutil
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from uhd_jax.checkpoint import (
    Checkpointer,
    CheckpointError,
    ConfigMismatch,
    differing_keys,
    load_model,
    require_same_config,
    require_same_model,
    save_model,
)
from uhd_jax.config import MeshConfig, to_dict
from uhd_jax.sharding.mesh import make_mesh
from uhd_jax.training import resume

PARAMS = {"decoder": {"kernel": np.arange(64, dtype=np.float32).reshape(8, 8)}}
TRAINING = {"step": np.int32(3), "moments": (np.ones(4, np.float32), ())}


def abstract(tree, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def write(workdir, *steps, keep=2, meta=None):
    checkpointer = Checkpointer(workdir, keep)
    for step in steps:
        checkpointer.save(step, PARAMS, TRAINING, {"next": step}, meta or {"config": to_dict(tiny.run())})
    checkpointer.close()


def test_restores_what_was_saved_into_other_shardings(tmp_path):
    write(tmp_path, 3, 5, 9, keep=2)
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step() == 9
    assert sorted(path.name for path in checkpointer.directory.iterdir() if path.is_dir()) == ["5", "9"]
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    before = {id(array) for array in jax.live_arrays()}
    restored = checkpointer.restore(9, abstract(PARAMS, rows), abstract(TRAINING))
    kernel = restored.params["decoder"]["kernel"]
    assert kernel.sharding == rows
    assert kernel.addressable_shards[0].data.shape[0] * 4 == kernel.shape[0]
    made = [array for array in jax.live_arrays() if id(array) not in before and array.shape == kernel.shape]
    assert all(len(array.devices()) == 8 for array in made)  # none is whole on one device
    np.testing.assert_array_equal(kernel, PARAMS["decoder"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, restored.training, TRAINING)
    assert restored.iterator == {"next": 9}
    assert restored.meta["config"]["name"] == "tiny"


def test_a_save_is_not_disturbed_by_donation(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.jit(lambda: jax.numpy.zeros((512, 512)))()
    checkpointer.save(0, {"x": x}, TRAINING, {}, {})
    for _ in range(50):
        x = add(x)
    checkpointer.wait()
    restored = checkpointer.restore(0, abstract({"x": x}), abstract(TRAINING))
    assert float(np.abs(restored.params["x"]).max()) == 0.0


def test_leftover_temporary_folder_is_harmless(tmp_path):
    write(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    assert Checkpointer(tmp_path).latest_step() == 1
    write(tmp_path, 2)
    assert Checkpointer(tmp_path).latest_step() == 2


@pytest.mark.parametrize("item", ["params", "training", "iterator", "meta"])
def test_missing_item_is_named(tmp_path, item):
    write(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "checkpoints" / "2" / item)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(
        CheckpointError, match=rf"checkpoints/2 lacks {item}; delete .*/2 to go on from checkpoint .*/?1"
    ):
        checkpointer.restore(2, abstract(PARAMS), abstract(TRAINING))


def test_damaged_data_is_a_typed_error(tmp_path):
    write(tmp_path, 1)
    for path in (tmp_path / "checkpoints" / "1" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoints/1 cannot be read; no other checkpoint is there"):
        Checkpointer(tmp_path).restore(1, abstract(PARAMS), abstract(TRAINING))


def test_other_shapes_are_refused(tmp_path):
    write(tmp_path, 1)
    other = {"decoder": {"kernel": np.zeros((8, 4), np.float32)}}
    with pytest.raises(CheckpointError, match=r"cannot be read.*\(8, 4\)"):
        Checkpointer(tmp_path).restore(1, abstract(other), abstract(TRAINING))


def test_config_of_another_model_is_refused_by_key(tmp_path):
    config = tiny.run()
    saved = to_dict(config)
    require_same_config(tmp_path, saved, config)
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, mode="4x"))
    with pytest.raises(ConfigMismatch, match=r"model\.mode: '16x' there, '4x' here"):
        require_same_config(tmp_path, saved, wider)
    with pytest.raises(ConfigMismatch, match=r"model\.tower\.heads: 2 there, 4 here"):
        four = dataclasses.replace(config.model.tower, heads=4)
        require_same_model(tmp_path, config.model, dataclasses.replace(wider.model, tower=four))
    assert differing_keys(to_dict(config), to_dict(tiny.run([tiny.stage(rows=16)]))) == ["train.stages.0.rows"]


def test_how_long_and_how_often_may_differ():
    longer = tiny.run([tiny.stage(steps=99, accumulation=2)], log_every=7, checkpoint_every=9, mesh=MeshConfig(fsdp=2))
    assert differing_keys(to_dict(tiny.run()), to_dict(longer)) == []


def test_a_run_goes_on_with_another_index_and_without_one():
    def run(**data):
        stage = tiny.stage()
        return to_dict(tiny.run([dataclasses.replace(stage, data=dataclasses.replace(stage.data, **data))]))

    without = run()
    assert differing_keys(without, run(index="a.npz")) == []
    del without["train"]["stages"][0]["data"]["index"]  # as before there were any
    assert differing_keys(without, run()) == differing_keys(run(), without) == []
    parts = [[{"name": "a", "source": "s", "options": {}, "weight": 1.0} | more] for more in ({}, {"index": "a.npz"})]
    assert differing_keys(*(run(options={"parts": one}) for one in parts)) == []


def test_the_longest_input_that_a_source_named_makes_no_other_model():
    config = tiny.run()
    model = dataclasses.replace(config.model, decoder=dataclasses.replace(config.model.decoder, max_positions=64))
    require_same_model("there", model, config.model)
    saved = to_dict(config)
    del saved["model"]["decoder"]["max_positions"]  # as an older version wrote it
    assert differing_keys(saved, to_dict(dataclasses.replace(config, model=model))) == []


def test_full_disk_is_a_typed_error_and_the_previous_checkpoint_stays(tmp_path):
    script = textwrap.dedent(
        """
        import resource, sys
        import numpy as np
        from uhd_jax.checkpoint import Checkpointer, CheckpointError, save_model
        from uhd_jax.config import DecoderConfig, ModelConfig

        checkpointer = Checkpointer(sys.argv[1], keep=1)
        random = np.random.default_rng(0)
        params = {"a": random.random((256, 256), np.float32)}
        checkpointer.save(1, params, {"step": np.int32(1)}, {}, {})
        checkpointer.wait()
        # No file may grow beyond 32 KiB: writes fail as they do on a full disk.
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, hard))
        try:
            checkpointer.save(2, {"a": random.random((256, 256), np.float32)}, {"step": np.int32(2)}, {}, {})
            checkpointer.wait()
        except CheckpointError as error:
            print("run:", error)
        try:
            save_model(sys.argv[1] + "/model", params, ModelConfig(DecoderConfig(8, 8, 8, 1, 1, 1, 8)))
        except CheckpointError as error:
            print("model:", error)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert f"run: cannot write {tmp_path}/checkpoints" in done.stdout, done.stderr
    assert f"model: cannot write {tmp_path}/model" in done.stdout
    assert "MiB free there" in done.stdout
    assert "Cause: File too large" in done.stdout
    assert done.stderr == ""  # neither Orbax nor its threads say it again, at length
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step() == 1
    restored = checkpointer.restore(
        1, abstract({"a": np.zeros((256, 256), np.float32)}), abstract({"step": np.int32(0)})
    )
    np.testing.assert_array_equal(restored.params["a"], np.random.default_rng(0).random((256, 256), np.float32))
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(tmp_path / "model")


def test_another_process_that_is_gone_is_no_full_disk(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)

    def check():
        try:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset")
        except jax.errors.JaxRuntimeError as error:  # as Orbax does
            raise TimeoutError("Timed out while waiting for async_write_complete barrier.") from error

    monkeypatch.setattr(checkpointer._manager, "check_for_errors", check)
    with pytest.raises(CheckpointError, match="cannot write"):
        checkpointer.check()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="connection reset"):
        checkpointer.check()


def test_model_round_trip_and_from_a_run(tmp_path):
    save_model(tmp_path / "model", PARAMS, tiny.MODEL)
    save_model(tmp_path / "model", jax.tree.map(lambda a: a + 1, PARAMS), tiny.MODEL)
    params, config = load_model(tmp_path / "model")
    assert config == tiny.MODEL
    np.testing.assert_array_equal(params["decoder"]["kernel"], PARAMS["decoder"]["kernel"] + 1)

    write(tmp_path / "run", 4, 12)
    halves = lambda tree: jax.tree.map(  # noqa: E731
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.numpy.bfloat16, sharding=leaf.sharding), tree
    )
    params, config = load_model(tmp_path / "run", halves)
    assert config == tiny.MODEL
    assert params["decoder"]["kernel"].dtype == jax.numpy.bfloat16


def test_reading_is_silent_and_leaves_the_hooks_as_they_were(tmp_path, caplog):
    write(tmp_path, 1)
    before = sys.unraisablehook, list(logging.getLogger("absl").filters)
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path)
        logging.getLogger("absl").warning("of somebody else")
    assert (sys.unraisablehook, logging.getLogger("absl").filters) == before
    assert caplog.messages == ["of somebody else"]


def damage(folder):
    for path in folder.rglob("*") if folder.is_dir() else [folder]:
        if path.is_file():
            path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "part", "complaint"),
    [
        (shutil.rmtree, "params", "lacks params"),
        (shutil.rmtree, "meta", "lacks meta"),
        (damage, "meta", "cannot be read"),
        (damage, "params", "the files in its folder params are damaged or incomplete"),
        (lambda path: path.unlink(), "params/_METADATA", "the files in its folder params are damaged or incomplete"),
    ],
)
def test_a_damaged_run_names_the_folder_and_what_to_do(tmp_path, spoil, part, complaint, capfd):
    write(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "2"
    spoil(newest / part)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        load_model(tmp_path)
    assert f"{newest} " in str(caught.value) and f"delete {newest} to go on from checkpoint 1" in str(caught.value)
    assert "AttributeError" not in str(caught.value) and "\n" not in str(caught.value)
    del caught
    gc.collect()  # tasks that failed and were awaited by nobody are reported here
    assert capfd.readouterr().err == ""
    shutil.rmtree(newest)
    load_model(tmp_path)


def test_no_model_and_damaged_model(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(tmp_path)
    save_model(tmp_path, PARAMS, tiny.MODEL)
    described = json.loads((tmp_path / "model.json").read_text())
    described["model"]["tower"]["hands"] = 2
    (tmp_path / "model.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"copy it there again.*model\.tower\.hands: unknown key"):
        load_model(tmp_path)
    save_model(tmp_path, PARAMS, tiny.MODEL)
    shutil.rmtree(tmp_path / "params")
    with pytest.raises(CheckpointError, match=f"{tmp_path} lacks params; copy it there again"):
        load_model(tmp_path)


def seen(monkeypatch, own, first):
    """The steps that `resume` tries where this process sees one list of checkpoints after the other; and its sleeps."""
    own, sleeps = iter(own), []
    checkpointer = types.SimpleNamespace(directory="runs/x", steps=lambda: next(own), reload=lambda: None)
    monkeypatch.setattr(resume.multihost, "as_first", lambda steps: first)
    monkeypatch.setattr(resume.time, "sleep", sleeps.append)
    return resume._steps_of_all(checkpointer), sleeps


def test_a_process_waits_until_it_sees_the_checkpoints_of_the_first(monkeypatch):
    assert seen(monkeypatch, [[100], [100], [200, 100]], [200, 100]) == ([200, 100], [1, 1])
    told = r"after 60 s process 0 sees the checkpoints \[200, 100\] there, the first process \[100\]"
    with pytest.raises(CheckpointError, match=told):
        seen(monkeypatch, itertools.repeat([200, 100]), [100])


def test_a_step_is_never_saved_twice(tmp_path):
    write(tmp_path, 3)
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="step 3 is not saved, as checkpoint 3 is there already"):
        checkpointer.save(3, PARAMS, TRAINING, {}, {})
    checkpointer.close()
