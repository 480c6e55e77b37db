"""Statistics of a stage's data: what they say of a sample is what training would do with it."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import tiny
from data_files import write_records

from uhd_jax.analysis.data_stats import StageData, stage_report
from uhd_jax.config import (
    AugmentConfig,
    BucketConfig,
    ChatConfig,
    ConfigError,
    DataConfig,
    PreResizeConfig,
    SlicingConfig,
    TrainConfig,
)
from uhd_jax.data.index import open_index
from uhd_jax.data.sources import make_source
from uhd_jax.data.tokenizer import load_tokenizer
from uhd_jax.data.windows import FEWER_SLICES, KEPT, MALFORMED, REFUSED, TOO_LONG, TURNS_CUT, UNTRAINED, WindowPlanner

MODEL = dataclasses.replace(
    tiny.MODEL,
    tower=dataclasses.replace(tiny.MODEL.tower, patch_size=14),
    slicing=SlicingConfig(scale_resolution=112, max_slices=6),
)
AUGMENT = AugmentConfig(resize_probability=0.7, jpeg_probability=0.5, ocr_probability=0.5)
HALF = PreResizeConfig(refill_probability=0.5)
TRAIN = TrainConfig(stages=(tiny.stage(),), packing_window=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataConfig("json", {"path": str(write_records(tmp_path_factory.mktemp("records")))})


def stage_data(data, model=MODEL, **changes):
    stage = tiny.stage(**(dict(data=data, packed_length=300, max_slices=6, rows=2, buckets=()) | changes))
    chat = model.for_stage(stage).chat
    return StageData(open_index(data, [chat])[0], stage, model, TRAIN)


BUCKETS = (BucketConfig(slots=8, tokens=200, patches=64), BucketConfig(slots=14, tokens=260, patches=128))


@pytest.mark.parametrize(
    ("changes", "chat"),
    [
        (dict(buckets=BUCKETS[:1], augment=AUGMENT, max_aspect_ratio=5.0, packed_length=200), ChatConfig()),
        (dict(packed_length=170, too_long="drop"), ChatConfig()),
        (dict(packed_length=130, too_long="fewer_slices", pre_resize=HALF), ChatConfig()),
        (
            dict(packed_length=110, template="vicuna_v1"),
            ChatConfig(layout="A", system="Answer briefly.", turn_end="<|im_end|>"),
        ),
        (dict(buckets=BUCKETS), ChatConfig()),
        (dict(buckets=BUCKETS[:1], max_slices=4, scale_resolution=168), ChatConfig(use_image_id=False)),
        (dict(packed_length=220, slots=7), ChatConfig(system="Answer.")),
        (
            dict(buckets=BUCKETS[1:], pre_resize=PreResizeConfig(long_side=300)),
            ChatConfig(layout="A", train_turn_marks=True),
        ),
    ],
)
def test_what_becomes_of_a_sample_is_what_training_does(data, changes, chat):
    model = dataclasses.replace(MODEL, chat=chat)
    seen = stage_data(data, model, **changes)
    fit = seen.fit()
    source = make_source(data)
    planner = WindowPlanner(seen.stage, seen.model, TRAIN, source, load_tokenizer("bytes", chat))
    assert fit.buckets == planner.buckets
    counters = Counter()
    for place in range(len(source)):
        prepared, problems = planner._prepare(place, planner.buckets)
        number = int(planner._stream[place])
        counters.update(problem.counter for problem in problems)
        assert fit.kept[number] == (prepared is not None)
        if prepared:
            sample = prepared.sample
            assert (fit.limits[number], fit.rounds[number]) == prepared.reduction
            needs = (fit.tokens[number], fit.views[number], fit.largest[number])
            assert needs == sample.needs
            assert fit.patches[number] == sum(plan.patches for plan in sample.plans)
            assert fit.trained[number] == sample.trained.sum()
    assert fit.counters == dict(counters)
    assert fit.counters[MALFORMED] == 1 and fit.counters.get(TOO_LONG, 0) > 0
    assert fit.counters[REFUSED] == 1 or seen.stage.max_aspect_ratio
    assert (fit.counters.get(TURNS_CUT, 0) > 0) == (seen.stage.too_long == "cut_turns")
    assert FEWER_SLICES not in fit.counters or seen.stage.too_long != "drop"


def test_reasons_are_given_with_examples(data):
    fit = stage_data(data, buckets=BUCKETS).fit()
    assert fit.counters[TOO_LONG] > 3 == len(fit.examples[TOO_LONG])
    assert fit.examples[UNTRAINED] == [(3, "no answer to train on"), (9, "an answer is empty")]
    ((number, reason),) = fit.examples[REFUSED]
    assert number == 5 and "absent.png" in reason
    assert all(f"{fit.limits[number]} instead of 6" in reason for number, reason in fit.examples[FEWER_SLICES])
    for number, reason in fit.examples[TURNS_CUT]:
        rounds = fit.rounds[number]
        assert reason == f"the oldest {f'{rounds} rounds' if rounds > 1 else 'round'} of question and answer cut"
    assert (fit.rounds > 0).sum() == fit.counters[TURNS_CUT] > 3


def test_more_programs_waste_less(data):
    report, fit = stage_report(stage_data(data), (1, 4))
    assert [one["name"] for one in report["bucket_lists"]] == [
        "1 program",
        "2 programs, as now",
        "4 programs",
    ]
    one, own, four = (found["padding"] for found in report["bucket_lists"])
    assert 0 < four["work"] < own["work"] < one["work"] < 0.9
    assert (
        report["kept"] == fit.kept.sum() == 60 - sum(count for name, count in fit.counters.items() if name not in KEPT)
    )
    assert report["tokens"]["max"] == fit.tokens.max() <= 300
    assert report["samples"] == 60 and report["image_height"]["min"] >= 20


def test_nothing_usable_is_no_error(data):
    report, fit = stage_report(stage_data(data, packed_length=2), (1,))
    assert not fit.kept.any() and report["tokens"] is None and report["kept"] == 0
    assert report["bucket_lists"][0]["padding"]["work"] is None


def test_a_mixture_is_packed_in_its_shares(tmp_path):
    counts, parts = (40, 40), []
    for name, weight, count in zip("ab", (0.9, 0.1), counts, strict=True):
        (tmp_path / name).mkdir()
        options = {"path": str(write_records(tmp_path / name, count))}
        parts.append({"name": name, "source": "json", "options": options, "weight": weight})
    mixture = DataConfig("mixture", {"parts": parts})
    seen = stage_data(mixture)
    planner = WindowPlanner(seen.stage, seen.model, TRAIN, make_source(mixture), load_tokenizer("bytes", ChatConfig()))
    assert seen._places[:90].tolist() == [planner._stream[place] for place in range(90)]
    assert (seen._places < 40).mean() == pytest.approx(0.9, abs=0.02)
    assert seen.fit().buckets == planner.buckets
    with pytest.raises(ConfigError, match="augment.ocr_parts: 'scans': the parts of its mixture are a, b"):
        stage_data(mixture, augment=AugmentConfig(ocr_parts=("scans",)))


def test_refilled_images_are_drawn(data):
    always = dict(pre_resize=PreResizeConfig(refill_probability=1.0), packed_length=2000)
    never = stage_data(data, packed_length=2000).fit()
    refilled = stage_data(data, **always).fit()
    half = stage_data(data, packed_length=2000, pre_resize=PreResizeConfig(refill_probability=0.5)).fit()
    assert never.patches.sum() < half.patches.sum() < refilled.patches.sum()
    assert np.array_equal(never.trained, refilled.trained)
