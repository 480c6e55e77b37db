"""Every metric in the harnesses' definitions, on made prediction files of 200 rows, against the harnesses' own code.

What their code said is stored beside the rows; where a harness is installed, it is asked again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io

import harnesses
import prediction_files
import pytest

from uhd_jax.evaluation.benchmarks import BENCHMARKS, Outcome
from uhd_jax.evaluation.metrics import boxes
from uhd_jax.evaluation.metrics.styles import STYLES
from uhd_jax.evaluation.samples import Sample

NAMES = list(prediction_files.MAKERS)


def sample_of(name: str, number: int, row: dict) -> Sample:
    details = {}
    if name == "mmbench":
        details = {"question": str(row["index"] % 10**6)}
    if name == "mme":
        details = {"image": row["image"]}
    if name == "refcoco":
        details = {"box": row["box"], "size": [row["height"], row["width"]]}
    answers = tuple(row.get("answers") or (row.get("answer"),))
    return Sample(
        str(number), "?", (), answers, tuple(row.get("options", ())), category=row.get("category", ""), details=details
    )


def ours(name: str, rows: list[dict], style: str) -> tuple[list[float], dict[str, float]]:
    benchmark = BENCHMARKS[name]
    samples = [sample_of(name, number, row) for number, row in enumerate(rows)]
    outcomes = [benchmark.score(sample, row["prediction"], style) for sample, row in zip(samples, rows, strict=True)]
    return [one.score for one in outcomes], benchmark.summarise(list(zip(samples, outcomes, strict=True)), style)


def harness_summary(name: str, summary: dict[str, float], style: str) -> dict[str, float]:
    """Ours under the names of `harnesses`."""
    if name in ("pope", "mme"):
        return summary
    key = {"ocrbench": "score", "docvqa": "anls"}.get(name, "accuracy")
    return {"score": summary[key]}


@pytest.mark.parametrize("style", ["lmms-eval", "vlmevalkit"])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_scores_as_in_the_harness(name, style):
    rows, summaries = prediction_files.read(name)
    assert len(rows) == prediction_files.ROWS
    expected = [row[style] for row in rows]
    if name == "refcoco":  # the harness scores the overlap, of which ours is whether it is enough
        found = [boxes.parse_box(row["prediction"], boxes.Size(row["height"], row["width"]), style) for row in rows]
        overlaps = [boxes.iou(box, row["box"]) if box else 0 for box, row in zip(found, rows, strict=True)]
        assert overlaps == pytest.approx(expected, abs=1e-6)
        expected = [float(one >= 0.5) for one in expected]
    scores, summary = ours(name, rows, style)
    wrong = [
        (row, score) for row, score, wanted in zip(rows, scores, expected, strict=True) if abs(score - wanted) > 1e-9
    ]
    assert not wrong, wrong[:5]
    assert 0.05 < sum(expected) / len(rows) < 0.95, "the rows must tell right from wrong"
    mine = harness_summary(name, summary, style)
    for key, value in summaries[style].items():
        assert mine[key] == pytest.approx(value, abs=1e-5), key


@pytest.mark.parametrize("name", NAMES)
def test_the_definitions_differ_where_the_documentation_says_so(name):
    rows, _ = prediction_files.read(name)
    scores = {style: ours(name, rows, style)[0] for style in STYLES}
    same = {frozenset(pair) for pair in DIFFER.get(name, ())}
    for one in STYLES:
        for other in STYLES:
            if one < other:
                differ = scores[one] != scores[other]
                assert differ == (frozenset((one, other)) not in same), (one, other)


# Pairs of definitions that agree on every made row; all others disagree on some.
_HARNESSES, _LMMS, _KIT = ("lmms-eval", "vlmevalkit"), ("official", "lmms-eval"), ("official", "vlmevalkit")
DIFFER = {
    "textvqa": [_LMMS],
    "vizwiz": [_HARNESSES],
    "docvqa": [_HARNESSES],
    "chartqa": [_LMMS],
    "mmbench": [_KIT],
    "mmmu": [_LMMS],
    "ai2d": [_LMMS],
    "ocrbench": [_KIT],
    "refcoco": [_KIT],
}


def _ask(name: str, module: str, ask) -> None:
    rows, summaries = prediction_files.read(name)
    style = {"lmms_eval": "lmms-eval", "vlmeval": "vlmevalkit"}[module]
    with contextlib.redirect_stdout(io.StringIO()):
        scores, summary = ask(name, rows)
    assert scores == pytest.approx([row[style] for row in rows], abs=1e-9)
    assert summary == pytest.approx(summaries[style], abs=1e-9)


@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="lmms-eval is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_lmms_eval_still_says_so(name):
    _ask(name, "lmms_eval", harnesses.lmms)


@pytest.mark.skipif(not importlib.util.find_spec("vlmeval"), reason="VLMEvalKit is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_vlmevalkit_still_says_so(name):
    _ask(name, "vlmeval", harnesses.vlmevalkit)


def test_rows_are_made_as_stored():
    for name in NAMES:
        stored, _ = prediction_files.read(name)
        made = prediction_files.make_rows(name)
        assert [{key: row[key] for key in new} for row, new in zip(stored, made, strict=True)] == made


def test_outcomes_say_what_was_read():
    rows, _ = prediction_files.read("mmstar")
    outcome = BENCHMARKS["mmstar"].score(sample_of("mmstar", 0, rows[0] | {"answer": "B"}), "(B) it is", "official")
    assert outcome == Outcome(1.0, "B")
