"""Speed of parts: what is measured has the shapes, the FLOPs and the parameters it should; what is printed adds up."""

import dataclasses
import functools
import json
import time

import jax
import pytest
import tiny
import tiny_assistant
from command_line import assert_one_line, call

from uhd_jax import cost
from uhd_jax.analysis import bench_data, bench_generation, bench_report, bench_step, bench_torch
from uhd_jax.analysis.bench import FORWARD, TRAINING, case_of, full_batch, measure, parts_of, result, view_grid
from uhd_jax.config import BucketConfig, DataConfig
from uhd_jax.data.tokenizer import byte_tokenizer
from uhd_jax.generation.assistant import Assistant
from uhd_jax.models import uhd

pytestmark = pytest.mark.usefixtures("unoptimised")

MODEL = tiny.MODEL
STAGE = tiny.stage(buckets=(BucketConfig(2, 24, 32),), max_slices=3)
CASE = case_of(MODEL, STAGE, 2)


@pytest.mark.parametrize(
    ("patches", "multiple", "grid"), [(1024, 4, (32, 32)), (1152, 4, (32, 36)), (16, 4, (4, 4)), (80, 4, (4, 20))]
)
def test_the_largest_and_squarest_grid_of_a_slot(patches, multiple, grid):
    assert view_grid(patches, multiple) == grid


def test_a_batch_that_fills_its_bucket():
    batch = full_batch(CASE)
    assert batch.bucket == CASE.bucket and CASE.bucket.rows == 2
    assert (batch.patch_grids.prod(-1) == CASE.grid[0] * CASE.grid[1]).all() and batch.patches.any((0, 2, 3)).all()
    assert (batch.segments == 1).all()
    places = batch.visual_index[0]
    assert places[:4].tolist() == [0, 1, 2, 3] and (places[4:] == -1).all()  # two views of two tokens
    assert batch.loss_weights.sum() == 2 * 23


def test_parts_of_a_model():
    parts = parts_of(CASE, ("tower", "connector", "decoder"), (FORWARD,))
    assert [part.name for part in parts] == ["tower", "tower, no compressor", "connector", "decoder"]
    assert [part.counts for part in parts] == [{"views": 4}] * 3 + [{"tokens": 48}]
    work = cost.work([CASE.grid] * 4, [24] * 2)
    expected = cost.groups(cost.forward_flops(MODEL, work))
    flops = {part.name: part.flops for part in parts}
    assert flops["tower"] == expected["tower"] and flops["decoder"] == expected["decoder"]
    assert flops["tower, no compressor"] == cost.groups(cost.forward_flops(MODEL, work, "4x"))["tower"]
    for part in parts:
        part.call()
        assert part.memory_bytes > 0 and part.compile_seconds > 0


def test_training_costs_more_and_runs():
    (forward, training) = parts_of(CASE, ("connector",), (FORWARD, TRAINING))
    training.call()
    assert 1.5 * forward.flops < training.flops <= 3 * forward.flops


def test_turns_and_medians():
    order = []

    def caller(name, seconds):
        def call():
            order.append(name)
            time.sleep(seconds)

        return call

    first, second = measure([caller("a", 0.001), caller("b", 0.02)], 3)
    assert order == ["a", "b"] * 4
    assert 0.001 <= first.seconds < second.seconds and second.cpu_seconds < 0.02


def test_rates_of_a_part():
    (part,) = parts_of(CASE, ("connector",), (FORWARD,))
    timing = dataclasses.make_dataclass("Timing", ["seconds", "cpu_seconds"])(0.5, 0.25)
    figures = result(part, timing, peak=part.flops * 4, image_views=4)
    assert figures["per_second"] == {"views": 8.0, "images": 2.0}
    assert figures["utilisation"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "kind"), [("tower", TRAINING), ("tower, no compressor", FORWARD), ("decoder", TRAINING)]
)
def test_the_other_side_does_the_same_work(name, kind):
    """As many parameters as our part has, but for what its class has and does not use; and it runs."""
    pytest.importorskip("torch")
    made = bench_torch._made(CASE, name)
    counts = cost.parameter_counts(MODEL)
    ours = {
        "tower": sum(counts[part] for part in cost.GROUPS["tower"]),
        "tower, no compressor": sum(counts[part] for part in cost.GROUPS["tower"]) - counts["compressor"],
        "decoder": counts["decoder"],
    }[name]
    assert sum(parameter.numel() for parameter in made[0].parameters()) == ours
    there = bench_torch.counterpart(CASE, name, kind, compiled=False)
    there.call()
    assert there.described == made[2]


def test_what_has_no_class_there():
    hybrid = dataclasses.replace(CASE, model=tiny.HYBRID)
    assert bench_torch.counterpart(hybrid, "decoder", FORWARD, False) is None
    pooled = dataclasses.replace(MODEL, compressor=dataclasses.replace(MODEL.compressor, kind="average_pool"))
    assert bench_torch.counterpart(dataclasses.replace(CASE, model=pooled), "tower", FORWARD, False) is None


def test_the_step_and_its_data(monkeypatch):
    """With a loss that compiles quickly, and data that is slower than the step."""

    class Slow(tiny.RandomBatches):
        def __next__(self):
            time.sleep(0.2)
            return super().__next__()

    quick = functools.partial(tiny.quick_loss_sums, config=None)
    monkeypatch.setattr(bench_step, "loss_sums_of", lambda *_: lambda params, batch, key: quick(params, batch))
    monkeypatch.setattr(bench_step, "make_batches", lambda *_: Slow(buckets=(tiny.BUCKET,)))
    config = tiny.run((dataclasses.replace(STAGE, rows=8, buckets=(BucketConfig(2, 16, 16),)),))
    case = case_of(MODEL, config.train.stages[0], None)
    step = bench_step.measure_step(config, case, 1, 1e12, 4)
    assert step["flops"] == cost.train_flops(MODEL, cost.work([case.grid] * 16, [16] * 8), STAGE.trainable)
    assert step["per_second"]["views"] == pytest.approx(16 / step["seconds"])
    assert step["utilisation"] > 0 and step["memory_bytes"] > 0
    data = bench_step.measure_data(config, case, 2)
    assert data["images_per_second"] == pytest.approx(8 * data["batches_per_second"]) and data["steps"] == 2
    assert 0.2 < data["wait_share"] < 1


def test_data_that_is_not_there_is_said():
    absent = DataConfig("records", {"path": "nowhere.jsonl"})
    config = tiny.run((dataclasses.replace(STAGE, data=absent),))
    said = bench_step.measure_data(config, case_of(MODEL, config.train.stages[0], None), 1)
    assert "nowhere.jsonl" in said["skipped"]


def test_the_command(config_file, capsys):
    pytest.importorskip("torch")
    command = ["bench", f"--config={config_file}", "--config.train.stages[0].max_slices=1", "--rows=1"]
    command += ["--parts=connector", "--repeats=1", "--against=torch", "--no-torch-compile", "--json"]
    status, out, errors = call(capsys, *command)
    assert status == 0, errors
    report = json.loads(out)
    assert [(part["part"], part["pass"]) for part in report["parts"]] == [
        ("connector", "forward"),
        ("connector", "training"),
    ]
    for part, there in zip(report["parts"], report["against"], strict=True):
        assert there["ratio"] == pytest.approx(there["seconds"] / part["seconds"])
        assert there["class"] == "MiniCPMV4_6Merger"
    text = bench_report.table(report)
    assert "utilisation: FLOPs of the model" in text and "MiniCPMV4_6Merger" in text


def test_the_command_shows_the_pipeline(config_file, capsys, monkeypatch):
    speed = bench_data.Speed(720, 1280, 9, 0.4, 5.0, 2.0, 10.0, 100.0, 0.7)
    monkeypatch.setattr(bench_data, "measure", lambda repeats: [speed])
    status, out, errors = call(capsys, "bench", f"--config={config_file}", "--parts=pipeline")
    assert status == 0, errors
    assert bench_data.table([speed]) in out and "720x1280" in out


def test_unknown_parts_are_refused(config_file, capsys):
    status, _, errors = call(capsys, "bench", f"--config={config_file}", "--parts=tower,engine")
    assert status == 2
    assert_one_line(errors, "--parts=tower,engine: name some of tower, connector, decoder, step, data, pipeline")


def test_generation_says_the_same_as_transformers_and_takes_time(monkeypatch):
    pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.setattr(bench_generation, "TOKENS", 3)
    found = bench_generation.measure_generation(tiny_assistant.CONFIG, 2, 1, "torch")
    assert found["same_tokens"] and found["rows"] == 2
    names = [one["what"].split(",")[0] for one in found["speeds"]]
    assert names == ["first token", "further token", "first token of 2", "further token of 2"]
    for one in found["speeds"][::2]:
        assert one["against"]["cpu_ratio"] == one["against"]["cpu_seconds"] / one["cpu_seconds"] > 0
    text = "\n".join(bench_report._generation(found))
    assert "first token, 3 views and" in text and "the same tokens; above 1: it is slower" in text


def test_generation_of_what_transformers_lacks():
    config = tiny_assistant.CONFIG
    unlike = dataclasses.replace(config, chat=dataclasses.replace(config.chat, layout="A"))
    params = tiny.random_params(jax.eval_shape(lambda: uhd.init_params(unlike, jax.random.key(0))))
    model = Assistant(unlike, params, byte_tokenizer())
    with pytest.raises(bench_torch.BenchError, match="no whole model like this one"), bench_generation.theirs(model):
        pass
