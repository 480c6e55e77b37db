"""What happens to samples that cannot be trained on: counted, listed once, and a run ends when they are too many."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import source_files
import tiny
from image_files import encode, photo
from pipelines import Numbered, iterator, take

from uhd_jax.checkpoint import differing_keys
from uhd_jax.config import ConfigError, DataConfig, to_dict
from uhd_jax.data import windows
from uhd_jax.data.chat import Message
from uhd_jax.data.dropped import DroppedList
from uhd_jax.data.pipeline import make_iterator
from uhd_jax.data.sources import make_source
from uhd_jax.data.windows import DECODED, MALFORMED, REFUSED, UNTRAINED, PipelineError
from uhd_jax.slicing.plan import ImageRefused
from uhd_jax.training.metrics import Fill
from uhd_jax.training.step_log import Pending, StepLog


def write(tmp_path, *others, good=12):
    """A file of good records, and others behind them."""
    (tmp_path / "a.png").write_bytes(encode(photo(112, 112)))
    (tmp_path / "bad.png").write_bytes(encode(photo(112, 112))[:200])
    record = source_files.llava((["a.png"], "What?", "A photo."))
    lines = [json.dumps(one) for one in (*[record] * good, *others)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines))
    return make_source(DataConfig("json", {"path": str(path)}))


BROKEN = [
    (source_files.llava((["missing.png"], "What?", "A.")), REFUSED),
    (source_files.llava((["bad.png"], "What?", "A.")), REFUSED),
    (source_files.llava((["../a.png"], "What?", "A.")), REFUSED),
    (source_files.llava((["a.png"], "<image>What?", "A.")), MALFORMED),
    ({"conversations": 7}, MALFORMED),
    (source_files.llava((["a.png"], "What?", " \n")), UNTRAINED),
    (source_files.llava((["a.png"], "What?", "", "And?", "A.")), UNTRAINED),
    (source_files.llava((["a.png"], "What?")), UNTRAINED),
]


@pytest.mark.parametrize("workers", [0, 1])
def test_every_kind_of_broken_sample_is_counted_and_listed_once(tmp_path, workers):
    source = write(tmp_path, *(record for record, _ in BROKEN))
    train = {"packing_window": 20, "data_workers": workers}
    path = tmp_path / "dropped.jsonl"
    batches = listed(source, path, train)
    while batches.get_state()["position"]["start"] < 60:  # three epochs
        _, info = next(batches)
    state = batches.get_state()
    batches.close()
    resumed = listed(source, path, train)
    resumed.set_state(state)
    take(resumed, 2)
    resumed.close()
    entries = {entry["where"]: entry for entry in map(json.loads, path.read_text().splitlines())}
    assert len(entries) == len(path.read_text().splitlines()) == len(BROKEN)
    for line, (_, counter) in enumerate(BROKEN, 13):
        entry = entries[f"{tmp_path}/x.jsonl:{line}"]
        assert entry["counter"] == counter and entry["reason"] and not entry["reason"].startswith(str(tmp_path / "x"))
    for name, count in ((REFUSED, 3), (MALFORMED, 2), (UNTRAINED, 3)):
        assert info.counters[name] >= 2 * count


def listed(source, path, train):
    stage = tiny.stage(rows=4, packed_length=160, bucket_budget=2)
    from pipelines import MODEL, TOKENIZER

    run = tiny.run([stage], **train)
    return make_iterator(stage, MODEL, run.train, source, TOKENIZER, dropped=path)


def test_a_list_survives_a_line_cut_off(tmp_path):
    path = tmp_path / "dropped.jsonl"
    first = DroppedList(path)
    first.add("a:1", REFUSED, "é\n")
    path.write_text(path.read_text() + '{"where": "b')
    again = DroppedList(path)
    again.add("a:1", REFUSED, "é\n")
    again.add("a:1", MALFORMED, "x")
    lines = path.read_text().splitlines()
    assert [json.loads(line)["counter"] for line in (lines[0], lines[-1])] == [REFUSED, MALFORMED] and len(lines) == 3
    DroppedList(tmp_path / "no folder" / "x").add("a", REFUSED, "x")  # is no reason to stop


class Broken(Numbered):
    """A share of the answers is empty."""

    def __init__(self, every):
        super().__init__(400, images=False)
        self._every = every

    def messages(self, index):
        return (*super().messages(index)[:1], Message("assistant", ("" if index % self._every == 0 else "x",)))


def test_too_many_broken_samples_end_the_run(monkeypatch):
    monkeypatch.setattr(windows, "JUDGED_AFTER", 96)
    train = {"max_broken_samples": 0.2, "packing_window": 48}
    batches = iterator(Broken(4), train=train)
    with pytest.raises(
        PipelineError, match=r"2\d of 96 samples of the source 'test' are broken.*=0\.2.*answer 2\d; mend"
    ):
        take(batches, 200)
    assert batches.get_state()["position"]["start"] in (48, 96)  # not before
    for every, share in ((6, 0.2), (4, 1.0)):
        batches = iterator(Broken(every), train=train | {"max_broken_samples": share})
        while next(batches)[1].read < 400:
            pass
        batches.close()


def test_a_source_of_broken_samples_alone_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(windows, "JUDGED_AFTER", 96)
    read = []

    class Counting(Broken):
        def messages(self, index):
            read.append(index)
            return super().messages(index)

    with pytest.raises(PipelineError, match="96 of 96 samples"):
        next(iterator(Counting(1), train={"packing_window": 48, "prefetch": 0}))
    assert len(read) < windows.PLANNING_SAMPLES


class Damaged(Numbered):
    """A share of the images is cut off, which shows only when its pixels are read."""

    def __init__(self, every):
        super().__init__(96)
        self._every = every

    def images(self, index):
        if index % self._every == 1:
            raise ImageRefused("is cut off")
        return super().images(index)


def together(source, steps, tell=True, **train):
    """The info of the last step on two hosts, or the errors of both; after every step they tell what they found."""
    train = {"packing_window": 48} | train
    hosts = [iterator(source, (host, 2), train=train, together=tell) for host in range(2)]
    for step in range(steps):
        infos, errors = [], []
        for one in hosts:
            try:
                infos.append(next(one)[1])
            except PipelineError as error:
                errors.append(str(error))
        if errors:
            return step, errors
        told = [sum(info.damaged.get(name, 0) for info in infos) for name in DECODED]
        totals = [one.count_damaged(told) for one in hosts] if tell else []
    states = [one.get_state() for one in hosts]
    for one in hosts:
        one.close()
    return infos, totals, states


def test_damaged_pixels_of_all_hosts_are_counted_and_judged_at_the_same_step(monkeypatch):
    monkeypatch.setattr(windows, "JUDGED_AFTER", 48)
    alone = iterator(Damaged(8), train={"packing_window": 48, "max_broken_samples": 1.0})
    info = [next(alone)[1] for _ in range(15)][-1]
    infos, totals, states = together(Damaged(8), 15, max_broken_samples=1.0)
    assert 5 < info.counters[REFUSED] == totals[0][REFUSED] == totals[1][REFUSED]
    assert all(its.counters[REFUSED] == 0 for its in infos) and states[0] == states[1] == alone.get_state()
    alone.close()
    # An eighth of all samples is damaged, a sixteenth of them in the rows of each host.
    step, errors = together(Damaged(8), 15, max_broken_samples=0.1)
    assert len(errors) == 2 and errors[0] == errors[1] and "more than the share" in errors[0]
    assert len(together(Damaged(8), 15, tell=False, max_broken_samples=0.1)) == 3  # as no host knows of the others'
    resumed = iterator(Damaged(8), train={"packing_window": 48, "max_broken_samples": 1.0})
    resumed.set_state(states[0])
    assert next(resumed)[1].counters[REFUSED] >= totals[0][REFUSED]
    resumed.close()


def test_what_all_hosts_found_damaged_is_in_the_metrics():
    records, counted = [], []
    run = SimpleNamespace(
        config=tiny.run(),
        checkpointer=SimpleNamespace(check=lambda: None),
        console=SimpleNamespace(step=lambda stage: None, write=lambda record: None),
        writers=[SimpleNamespace(write=records.append)],
        **{"told": None, "peak": 1e12, "empty_total": 0, "empty_in_a_row": 0},
    )
    batches = SimpleNamespace(count_damaged=lambda counts: counted.append(counts) or {REFUSED: 5, MALFORMED: 1})
    log = StepLog(run, run.config.train.stages[0], SimpleNamespace(compile_seconds=0.0), batches)
    metrics = {"loss": np.float32(1), "weight_sum": np.float32(1), "skipped_in_a_row": np.int32(0)}
    info = {"epoch": 0.5, REFUSED: 2, MALFORMED: 0}
    told = np.float32(0), np.array([*Fill().numbers(), 3, 1], np.float32)
    log.dispatched(Pending(1, 1, metrics, told, info, Fill(), 0.0, 1))
    log.catch_up()
    assert counted == [[3, 1]] and (records[0][f"data/{REFUSED}"], records[0][f"data/{MALFORMED}"]) == (7, 1)


@pytest.mark.parametrize("judged", [48, 1000])
def test_what_ends_a_run_before_its_first_batch_is_listed(tmp_path, monkeypatch, caplog, judged):
    monkeypatch.setattr(windows, "JUDGED_AFTER", judged)
    path = tmp_path / "dropped.jsonl"
    broken = write(tmp_path, *([{"conversations": 7}] * 60), good=0)
    said = "mend those named in the log" if judged == 48 else "no sample .* is usable"
    with pytest.raises(PipelineError, match=said) as caught:
        next(iterator(broken, dropped=path, train={"packing_window": 48}))
    named = {entry["where"] for entry in map(json.loads, path.read_text().splitlines())}
    assert len(named) == min(judged, 60) and all(where.startswith(f"{tmp_path}/x.jsonl:") for where in named)
    assert "conversations: expected a list, got a number" in caplog.text
    sent = pickle.loads(pickle.dumps(caught.value))  # as by a worker process, whose log nobody sees
    assert sent.problems == caught.value.problems != ()


def test_the_share_is_checked_and_may_change_between_runs():
    with pytest.raises(ConfigError, match="max_broken_samples: must be a share"):
        tiny.run(max_broken_samples=1.5)
    runs = [to_dict(tiny.run(max_broken_samples=share)) for share in (0.1, 0.5)]
    assert differing_keys(*runs) == []


def test_parts_of_a_mixture_may_move_but_not_change():
    def run(**options):
        parts = [{"name": "a", "source": "json", "weight": 1.0, "options": options}]
        return to_dict(tiny.run([tiny.stage(data=DataConfig("mixture", {"parts": parts}))]))

    assert differing_keys(run(path="a", image_root="b"), run(path="c", image_root="d")) == []
    assert differing_keys(run(path="a"), run(path="a", other=1)) == [
        "train.stages.0.data.options.parts.0.options.other"
    ]
