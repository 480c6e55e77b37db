"""Compiling for machines that are not there: names, programs' text, tables; two small compiles where they can be."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny
from command_line import assert_one_line, call

from uhd_jax.analysis import aot_ceiling, aot_report, aot_targets
from uhd_jax.analysis.aot_compile import bucket_of, largest_view, needed_bytes, stage_of
from uhd_jax.analysis.aot_hlo import collectives_by_kind, count_calls, read_collectives
from uhd_jax.analysis.aot_targets import CHIPS, GIB, AotError, missing_compiler, parse_target
from uhd_jax.batch import Bucket
from uhd_jax.config import BucketConfig, from_config_dict
from uhd_jax.config.presets import SIGLIP2_SO400M
from uhd_jax.cost.peak import PEAK_FLOPS
from uhd_jax.sharding.mesh import AXES, ShardingError
from uhd_jax.sharding.rules import param_spec

# Pieces of compiled programs as the two compilers write them. That for TPUs has eight devices, a loop of 36 turns whose
# condition holds the count, a gather in it that runs beside a product and is named twice for that, a kernel whose text
# goes on over lines, another gather after it through the same channel, a reduce-scatter in the form of TPUs, and a loop
# whose count the compiler notes.
TPU, GPU = ((Path(__file__).parent / "hlo" / f"{name}.txt").read_text() for name in ("tpu", "gpu"))


@pytest.mark.parametrize(
    ("text", "chip", "topology", "groups", "devices"),
    [
        ("v5e:4x4", "v5e", "4x4", 1, 16),
        ("v5e-8", "v5e", "2x4", 1, 8),
        ("v5litepod-64", "v5e", "8x8", 1, 64),
        ("v5p:8x8x8", "v5p", "8x8x8", 1, 512),
        ("v5p-128", "v5p", "4x4x4", 1, 64),
        ("V6E-256", "v6e", "16x16", 1, 256),
        ("tpu7x", "tpu7x", "2x2x1", 1, 8),
        ("tpu7x:2x2x2", "tpu7x", "2x2x2", 1, 16),
        ("2xv5e:4x4", "v5e", "4x4", 2, 32),
        ("h100:8", "h100", "1x1x8", 1, 8),
        ("8xh200", "h200", "1x1x8", 1, 8),
        ("h100:64", "h100", "1x8x8", 8, 64),
    ],
)
def test_names_of_machines(text, chip, topology, groups, devices):
    target = parse_target(text)
    assert (target.chip_name, target.topology, target.groups, target.devices) == (chip, topology, groups, devices)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v9:2x2", "is not known; write one like"),
        ("v5e:2x2x2", "v5e has two sides"),
        ("v5p:4x4", "v5p has three sides"),
        ("v5e:0x4", "of at least 1"),
        ("v5p-100", "no such slice; known: v5p-8, v5p-16"),
        ("v6e-7", "no such slice; known: v6e-4, v6e-8"),
        ("h100:12", "12 GPUs are not up to 8, or whole hosts of 8"),
        ("", "is not known"),
    ],
)
def test_unknown_machines_are_refused(text, said):
    with pytest.raises(AotError, match=said):
        parse_target(text)


def test_collectives_of_a_program_for_tpus():
    found = {one.kind: one for one in read_collectives(TPU, 8)}
    gather = found["all-gather"]
    assert (gather.count, gather.payload_bytes, gather.group) == (36, 64 * 128 * 2, 8)
    assert gather.wire_bytes == 64 * 128 * 2 * 7 / 8
    scatter = found["reduce-scatter"]
    assert (scatter.count, scatter.payload_bytes, scatter.wire_bytes) == (1, 64 * 128 * 4, 64 * 128 * 4 * 7 / 8)
    reduce = found["all-reduce"]
    assert (reduce.count, reduce.payload_bytes, reduce.group, reduce.wire_bytes) == (5, 8, 2, 8)
    assert (found["collective-permute"].payload_bytes, found["collective-permute"].wire_bytes) == (20, 20)
    assert count_calls(TPU, "tpu_custom_call") == 1
    sums = collectives_by_kind(read_collectives(TPU, 8))
    assert sums["all-gather"]["count"] == 72 and sums["all-gather"]["instructions"] == 2  # one of the three names twice
    assert sums["all-gather"]["wire_bytes"] == 72 * gather.wire_bytes


def test_collectives_of_a_program_for_gpus():
    found = {one.kind: one for one in read_collectives(GPU, 8)}
    assert set(found) == {"all-gather", "reduce-scatter"}
    assert found["all-gather"].payload_bytes == pytest.approx(64 * 4 * 2)
    scatters = [one.payload_bytes for one in read_collectives(GPU, 8) if one.kind == "reduce-scatter"]
    assert scatters == pytest.approx([8 * 8 * 4, 64 * 4])  # one as it is, one that is started


def test_groups_that_span_slices_are_told_apart():
    crossing = {one.kind: one.crosses for one in read_collectives(TPU, 8, per_group=4)}
    assert crossing["all-gather"] and crossing["all-reduce"] and not crossing["collective-permute"]
    assert not any(one.crosses for one in read_collectives(TPU, 8))


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.25G of 15.75G hbm.", 18.25 * GIB),
        ("RESOURCE_EXHAUSTED: CompileTimeHbmOom: program (180.50G) exceeds available HBM (15.75G)", 180.5 * GIB),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 512.00M", 512 * 2**20),
        ("INTERNAL: something else, 18.25G", None),
    ],
)
def test_memory_that_a_compiler_asks_for(message, needed):
    assert needed_bytes(message) == needed


def test_shapes_to_compile():
    config = tiny.run((tiny.stage(slots=0, packed_length=1000, max_slices=3, scale_resolution=32),))
    stage = stage_of(config, None)
    patches = largest_view(config.model, stage)
    assert patches == 320  # of views of about 256: 32 x 32 pixels in patches of 2 x 2, and some more in other shapes
    bucket = bucket_of(config.model, stage)
    assert bucket == Bucket(8, 40, 1000, 320, 16)  # views of 20 visual tokens, 800 of them
    given = dataclasses.replace(stage, buckets=(BucketConfig(2, 16, 16), BucketConfig(3, 16, 32)))
    assert bucket_of(config.model, given) == Bucket(8, 3, 16, 32, 16)
    with pytest.raises(AotError, match="--stage=other: the configuration has only"):
        stage_of(config, "other")


def test_recomputation_counts_as_executed_alone():
    bucket = Bucket(8, 2, 64, 64, 16)
    none, full = (
        aot_ceiling.step_flops(
            dataclasses.replace(tiny.MODEL, tower_remat=policy, decoder_remat=policy), tiny.stage(), bucket, 4
        )
        for policy in ("none", "full")
    )
    assert none.executed == none.useful == full.useful
    assert 1.25 < full.executed / full.useful < 4 / 3  # nearly a third more: three passes become four, but for the rest
    frozen = tiny.stage(trainable=("connector", "decoder"))
    only_decoder = aot_ceiling.step_flops(tiny.MODEL, frozen, bucket, 4)
    assert only_decoder.executed - only_decoder.useful < full.executed - full.useful


REPORT = {
    "name": "uhd_v4",
    "stage": "stage4",
    "topology": "v5e:8x8",
    "chip": "v5e",
    "devices": 64,
    "groups": 1,
    "mesh": {"data": 1, "fsdp": 64, "tensor": 1},
    "rows": 64,
    "accumulation": 1,
    "bucket": {"slots": 54, "tokens": 4900, "patches": 1152},
    "tower_remat": "full",
    "decoder_remat": "full",
    "attention": "splash",
    "fits": True,
    "peak_memory_bytes": 12 * GIB,
    "device_memory_bytes": CHIPS["v5e"].memory_bytes,
    "memory": {"arguments": 2 * GIB, "outputs": 2 * GIB, "aliased": 2 * GIB, "temporary": 10 * GIB, "code": 0},
    "lower_seconds": 10.0,
    "compile_seconds": 200.0,
    "parameters": 8_753_160_624,
    "trained_parameters": 8_753_160_624,
    "flops_per_device": {"useful": 197e12, "executed": 250e12},
    "collectives": {
        "all-gather": {"instructions": 9, "count": 300, "payload_bytes": 64e9, "wire_bytes": 63e9},
    },
    "kernel_calls": 6,
    "seconds": {"compute": 250 / 197, "memory": 0.5, "links": 63 / 200, "network": 0.0},
    "utilisation_ceiling": {"overlapped": 197 / 250, "one_after_another": 0.4},
    "versions": {"jax": "0.10.2"},
}


def test_the_text_says_whether_it_fits():
    text = aot_report.table(REPORT)
    for part in ("fits: 12.00 of 15.75 GiB", "64 devices, mesh fsdp=64", "63.000", "at most 79%", "6 kernel calls"):
        assert part in text
    too_large = REPORT | {"fits": False, "peak_memory_bytes": 18 * GIB, "memory": {}, "seconds": None}
    too_large |= {"collectives": {}, "utilisation_ceiling": None}
    assert "does not fit by 2.25 GiB: 18.00 of 15.75 GiB per device" in aot_report.table(too_large)


def test_projection_to_more_chips():
    target = parse_target("v5e:8x8")
    same = aot_ceiling.project(REPORT, target, 64)
    assert same["utilisation"]["overlapped"] == pytest.approx(197 / 250)
    assert same["seconds"] == pytest.approx(REPORT["seconds"])
    more = aot_ceiling.project(REPORT, target, 1024)  # four pods, in each of which all is there twice
    assert more["mesh"] == {"dcn_data": 4, "data": 2, "fsdp": 128}
    gradients = 4 * 8_753_160_624 / 128
    wire = 63e9 * (127 / 128) / (63 / 64) + 2 * 1 / 2 * gradients
    assert more["seconds"]["links"] == pytest.approx(wire / 200e9)
    assert more["seconds"]["network"] == pytest.approx(2 * 3 / 4 * gradients / 3.125e9)
    assert more["utilisation"]["one_after_another"] < same["utilisation"]["one_after_another"]
    assert aot_ceiling.project(REPORT, parse_target("v5p:4x4x4"), 1024)["mesh"]["data"] == 8
    assert aot_ceiling.project(REPORT, parse_target("8xh100"), 64)["mesh"] == {"dcn_data": 8, "data": 1, "fsdp": 8}


def test_projected_meshes_are_those_that_the_sharding_rules_take():
    largest = aot_ceiling.LARGEST_SHARDS
    for shards, refused in ((largest, contextlib.nullcontext()), (2 * largest, pytest.raises(ShardingError))):
        mesh = jax.sharding.AbstractMesh((1, 1, shards, 1, 1), AXES)
        with refused:
            param_spec("tower/layers/mlp/fc1/kernel", (27, SIGLIP2_SO400M["width"], 4304), mesh)


def test_chips_agree_with_the_peaks_of_training():
    published = {peak for _, peak in PEAK_FLOPS}
    assert {chip.peak_flops for chip in CHIPS.values()} <= published


def test_errors_of_the_command_are_one_line(config_file, monkeypatch, capsys):
    command = ["compile", f"--config={config_file}"]
    status, _, errors = call(capsys, *command, "--topology=v9")
    assert status == 1
    assert_one_line(errors, "'v9' is not known")
    status, _, errors = call(capsys, *command, "--topology=v5e:2x2", "--effort=2")
    assert status == 2 and "argument --effort: invalid effort value: '2'" in errors
    monkeypatch.setattr(aot_targets, "missing_compiler", lambda target: "libtpu")
    status, _, errors = call(capsys, *command, "--topology=v5e:2x2")
    assert status == 1
    assert_one_line(errors, "needs libtpu: pip install 'uhd-jax[aot]'")


@pytest.mark.parametrize(("topology", "kernel", "effort"), [("v5e:2x2", "splash", -1), ("h100:8", "xla", 0)])
def test_small_steps_compile_for_machines_that_are_not_there(topology, kernel, effort, tmp_path):
    """In a process of its own, which has no devices yet; skipped without the extra `aot`."""
    if missing_compiler(parse_target(topology)):
        pytest.skip("the extra 'aot' is not installed")
    config = tmp_path / "small.py"
    config.write_text(SMALL)
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "uhd_jax", "compile", f"--config={config}", f"--topology={topology}"]
    command += [f"--effort={effort}", f"--out={out}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report == json.loads(out.read_text()) and report["effort"] == effort
    assert report["fits"] and 0 < report["peak_memory_bytes"] < GIB and report["compile_seconds"] > 0
    assert report["attention"] == kernel and (report["kernel_calls"] > 0) == (kernel == "splash")
    gathered = report["collectives"]["all-gather"]["payload_bytes"]
    assert gathered > 1.4 * 2 * report["parameters"]  # in bfloat16: all once, those of the layers once more backward
    assert "reduce-scatter" in report["collectives"] or "all-reduce" in report["collectives"]


SMALL = """
from ml_collections import ConfigDict


def get_config(arg=""):
    decoder = dict(vocab_size=512, width=256, mlp_width=512, layers=3, heads=4, kv_heads=2, head_dim=64, qk_norm=True)
    tower = dict(width=144, mlp_width=256, layers=3, heads=2, patch_size=14, table_side=16)
    stage = dict(
        name="only", data={"source": "records", "options": {"path": "none.jsonl"}}, steps=1, rows=8, packed_length=320,
        learning_rate=1e-3, learning_rate_min=0.0, buckets=[dict(slots=2, tokens=320, patches=320)],
        trainable=["tower", "patch_embedding", "position_table", "compressor", "connector", "decoder"],
    )
    model = {"decoder": decoder, "tower": tower, "compressor": {"after_layer": 1}}
    mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    return ConfigDict({"name": "small", "model": model, "train": {"stages": [stage], "mesh": mesh}})
"""


def test_the_small_configuration_is_one():
    space = {}
    exec(SMALL, space)
    assert from_config_dict(space["get_config"]()).train.stages[0].rows == 8
