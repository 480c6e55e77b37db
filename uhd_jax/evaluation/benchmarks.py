"""The benchmarks: how a row becomes a sample, what an output is worth, what the scores sum up to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from uhd_jax.data.sources.protocol import SourceError
from uhd_jax.evaluation import samples as fields
from uhd_jax.evaluation.metrics import boxes, choice, open_answer, text, vqa, yes_no
from uhd_jax.evaluation.metrics.styles import Style, mean
from uhd_jax.evaluation.samples import Fields, Sample
from uhd_jax.slicing.image_io import read_size

Kind = Literal["short", "choice", "yes_no", "text", "box"]  # of answer, which decides the prompt


class Outcome(NamedTuple):
    """What an output is worth."""

    score: float  # from 0 to 1
    parsed: str  # what the output was taken for


Scored = tuple[Sample, Outcome]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One benchmark, in all its published files."""

    kind: Kind
    read: Callable[[Fields, str], Sample | None]  # the row and the path of its file
    score: Callable[[Sample, str, Style], Outcome]
    summarise: Callable[[Sequence[Scored], Style], dict[str, float]]


def _reader(kind: Kind, *patterns: str, questions=fields.QUESTIONS, categories=fields.CATEGORIES):
    def read(row: Fields, path: str) -> Sample | None:
        options = row.options() if kind == "choice" else ()
        answers = row.answers()
        if options:
            answers = tuple(fields.letter(answer, options) for answer in answers)
        return Sample(
            id=row.id(),
            question=row.text(questions, "question"),
            images=row.images(fields.IMAGES, patterns),
            answers=answers,
            options=options,
            hint=str(row.find(fields.HINTS, "")),
            category=str(row.find(categories, "")),
        )

    return read


def _needs_answers(sample: Sample) -> tuple[str, ...]:
    if not sample.answers:
        raise SourceError(f"question {sample.id}: has no reference answer; a hidden test set cannot be scored here")
    return sample.answers


def _average(scored: Sequence[Scored], style: Style) -> dict[str, float]:
    """The mean, and that of each category where there are several."""
    summary = {"accuracy": mean([outcome.score for _, outcome in scored])}
    categories = dict.fromkeys(sample.category for sample, _ in scored)
    if 1 < len(categories) <= 100:
        for category in sorted(categories):
            own = [outcome.score for sample, outcome in scored if sample.category == category]
            summary[category or "other"] = mean(own)
    return summary


def _vqa(benchmark: str):
    def score(sample: Sample, output: str, style: Style) -> Outcome:
        return Outcome(vqa.accuracy(output, _needs_answers(sample), benchmark, style), output.strip())

    return score


def _anls(sample: Sample, output: str, style: Style) -> Outcome:
    return Outcome(text.anls(output, _needs_answers(sample), style), output.strip())


def _named(name: str):
    def summarise(scored: Sequence[Scored], style: Style) -> dict[str, float]:
        return {name: mean([outcome.score for _, outcome in scored])}

    return summarise


def _chartqa_read(row: Fields, path: str) -> Sample:
    sample = _reader("short", "png/{imgname}")(row, path)
    named = sample.category or str(row.find(("split",), Path(path).stem))
    return dataclasses.replace(sample, category=_part(named))


def _part(name: str) -> str:
    return next((part for part in ("human", "augmented") if part in name), "")


def _relaxed(sample: Sample, output: str, style: Style) -> Outcome:
    return Outcome(text.relaxed_accuracy(output, _needs_answers(sample), style), output.strip())


def _exact(sample: Sample, output: str, style: Style) -> Outcome:
    return Outcome(text.exact_match(output, _needs_answers(sample)[0], style), output.strip())


_READERS = {
    "scienceqa": {"official": choice.scienceqa, "lmms-eval": choice.scienceqa_lmms},
    "mmbench": {"official": choice.vlmevalkit, "lmms-eval": choice.mmbench_lmms},
    "mmmu": {"official": choice.mmmu, "lmms-eval": choice.mmmu},
    "mmstar": {"official": choice.mmstar, "lmms-eval": choice.lmms},
    "ai2d": {"official": choice.ai2d_lmms, "lmms-eval": choice.ai2d_lmms},
}


def read_choice(benchmark: str, output: str, options: Sequence[str], style: Style) -> str:
    """The letter that an output names, "" for none, as the benchmark or the harness reads it."""
    reader = _READERS[benchmark].get(style, choice.vlmevalkit)
    return reader(output.strip() if benchmark == "mmbench" else output, options)


_UNSEEN = "\N{REPLACEMENT CHARACTER}"  # in the place of an option's text, which no answer has


def _choice(benchmark: str):
    def score(sample: Sample, output: str, style: Style) -> Outcome:
        parsed = read_choice(benchmark, output, sample.options or (_UNSEEN,) * sample.letters, style)
        return Outcome(float(parsed == _needs_answers(sample)[0]), parsed)

    return score


def _scienceqa_read(row: Fields, path: str) -> Sample | None:
    """The image questions of the test split, which papers report as SQA-IMG."""
    if row.row.get("split", "test") != "test":
        return None
    sample = _reader("choice", "{split}/{_key}/{image}", "{_key}/{image}")(row, path)
    return sample if sample.images else None


def _mmbench_read(row: Fields, path: str) -> Sample:
    sample = _reader("choice")(row, path)
    if not sample.id.isdecimal():
        raise SourceError(f"field 'index': {sample.id!r} is not a number, by which rotations of a question are found")
    return dataclasses.replace(sample, details={"question": str(int(sample.id) % 1_000_000)})


def _mmbench(scored: Sequence[Scored], style: Style) -> dict[str, float]:
    """Circular: a question counts when it is right in every rotation; besides, all rows by themselves."""
    right = choice.circular([(sample.details["question"], outcome.score == 1) for sample, outcome in scored])
    category = {sample.details["question"]: sample.category for sample, _ in reversed(scored)}
    groups = [
        (Sample(question, "", (), (), category=category[question]), Outcome(float(hit), ""))
        for question, hit in right.items()
    ]
    return _average(groups, style) | {"accuracy of single rows": mean([outcome.score for _, outcome in scored])}


def _mmmu_read(row: Fields, path: str) -> Sample:
    sample = _reader("choice")(row, path)
    subject = re.fullmatch(r"[a-z]+_(.+)_\d+", sample.id)
    return dataclasses.replace(sample, category=subject[1] if subject else sample.category)


def _mmmu(sample: Sample, output: str, style: Style) -> Outcome:
    if sample.options:
        return _choice("mmmu")(sample, output, style)
    answers = _needs_answers(sample)
    if style == "vlmevalkit":  # which makes a choice of it, between the answer and others
        parsed = choice.vlmevalkit(output, (answers[0], "Other Answers"))
        return Outcome(float(parsed == "A"), parsed)
    candidates = open_answer.parse(output)
    return Outcome(float(open_answer.is_right(candidates, answers)), str(candidates))


def _mmstar_read(row: Fields, path: str) -> Sample:
    """The question lists its four options itself; in VLMEvalKit's table they are columns."""
    sample = _reader("choice")(row, path)
    return sample if sample.options else dataclasses.replace(sample, letters=4)


def _mmstar(scored: Sequence[Scored], style: Style) -> dict[str, float]:
    """As `_average`; lmms-eval's overall score is the mean of the categories'."""
    summary = _average(scored, style)
    if style == "lmms-eval" and len(summary) > 1:
        summary["accuracy"] = mean([value for name, value in summary.items() if name != "accuracy"])
    return summary


def _pope_read(row: Fields, path: str) -> Sample:
    sample = _reader("yes_no")(row, path)
    named = sample.category or Path(path).stem
    split = next((part for part in ("random", "popular", "adversarial") if part in named), sample.category)
    return dataclasses.replace(sample, id=f"{split}/{sample.id}", category=split)


def _yes_no(parse: Callable[[str, Style], str]):
    def score(sample: Sample, output: str, style: Style) -> Outcome:
        wanted = _needs_answers(sample)[0].strip().lower()
        if wanted not in ("yes", "no"):
            raise SourceError(f"question {sample.id}: its answer must be yes or no, not {wanted!r}")
        parsed = parse(output, style)
        return Outcome(float(parsed == wanted), parsed)

    return score


def _pope(scored: Sequence[Scored], style: Style) -> dict[str, float]:
    """Of all questions, and of each split; f1_mean is the mean of the splits' F1, which papers report."""

    def scores(some: Sequence[Scored]) -> dict[str, float]:
        return yes_no.pope([(outcome.parsed, sample.answers[0].strip().lower()) for sample, outcome in some], style)

    summary, splits = scores(scored), sorted({sample.category for sample, _ in scored})
    if len(splits) > 1:
        own = {split: scores([one for one in scored if one[0].category == split]) for split in splits}
        summary["f1_mean"] = mean([values["f1"] for values in own.values()])
        summary |= {f"{split} {name}": value for split, values in own.items() for name, value in values.items()}
    return summary


def _mme_read(row: Fields, path: str) -> Sample:
    sample = _reader("yes_no")(row, path)
    image = str(row.find(("image_path", "question_id"), sample.id.rpartition("/")[0]) or row.row.get("image"))
    number = row.find(("index",), "")
    return dataclasses.replace(
        sample, id=f"{sample.id}" if number else f"{image}/{sample.question}", details={"image": image}
    )


def _mme(scored: Sequence[Scored], style: Style) -> dict[str, float]:
    return yes_no.mme((sample.category, sample.details["image"], outcome.score == 1) for sample, outcome in scored)


def _ocrbench(sample: Sample, output: str, style: Style) -> Outcome:
    return Outcome(text.ocrbench(output, _needs_answers(sample), sample.category, style), output.strip())


def _ocrbench_summary(scored: Sequence[Scored], style: Style) -> dict[str, float]:
    right: dict[str, float] = {}
    for sample, outcome in scored:
        if sample.category not in text.OCRBENCH:
            raise SourceError(f"question {sample.id}: {sample.category!r} is none of {', '.join(text.OCRBENCH)}")
        right[sample.category] = right.get(sample.category, 0) + outcome.score
    return text.ocrbench_summary(right, style)


_REGION = re.compile(r"<(?:p|ref)>|</(?:p|ref)>")
_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def _refcoco_read(row: Fields, path: str) -> Sample:
    """The box is (left, top, right, bottom) in pixels; in Hugging Face's copies (left, top, width, height)."""
    images = row.images(fields.IMAGES, ())
    if not images:
        raise SourceError("has no image")
    corners = [row.row.get(name) for name in _CORNERS]
    box = fields.literal_list(row.find(("bbox", "box"), None if None in corners else corners))
    if not isinstance(box, list) or len(box) != 4:
        raise SourceError(f"field 'bbox' (the object's box): must be four numbers, not {box!r:.80}")
    size = read_size(images[0])
    left, top, right, bottom = map(float, box)
    if "segmentation" in row.row or "iscrowd" in row.row:  # the copies that keep COCO's fields keep its boxes too
        right, bottom = left + right, top + bottom
    scaled = left / size.width, top / size.height, right / size.width, bottom / size.height
    named = row.row.get("expression") or row.row.get("sent") or row.answers(("answer", "question"))[0]
    return Sample(
        id=row.id(),
        question=_REGION.sub("", str(named)).strip(),
        images=images,
        answers=(str([round(value, 4) for value in scaled]),),
        category=str(row.find(("dataset_name", "split"), "")),
        details={"box": scaled, "size": list(size)},
    )


def _refcoco(sample: Sample, output: str, style: Style) -> Outcome:
    found = boxes.parse_box(output, boxes.Size(*sample.details["size"]), style)
    overlap = 0.0 if found is None else boxes.iou(found, sample.details["box"])
    return Outcome(float(overlap >= boxes.THRESHOLD), f"IoU {overlap:.3f}")


_COCO = ("{image}.jpg", "COCO_val2014_{image_id:0>12}.jpg", "val2014/COCO_val2014_{image_id:0>12}.jpg")

BENCHMARKS = {
    "textvqa": Benchmark(
        "short", _reader("short", "{image_id}.jpg", "train_images/{image_id}.jpg"), _vqa("textvqa"), _named("accuracy")
    ),
    "vqav2": Benchmark("short", _reader("short", *_COCO, categories=("answer_type",)), _vqa("vqav2"), _average),
    "vizwiz": Benchmark(
        "short", _reader("short", "val/{image}", categories=("answer_type",)), _vqa("vizwiz"), _average
    ),
    "docvqa": Benchmark("short", _reader("short"), _anls, _named("anls")),
    "infovqa": Benchmark("short", _reader("short"), _anls, _named("anls")),
    "chartqa": Benchmark("short", _chartqa_read, _relaxed, _average),
    "gqa": Benchmark("short", _reader("short", "{imageId}.jpg", categories=()), _exact, _named("accuracy")),
    "scienceqa": Benchmark("choice", _scienceqa_read, _choice("scienceqa"), _average),
    "pope": Benchmark("yes_no", _pope_read, _yes_no(yes_no.parse_pope), _pope),
    "mme": Benchmark("yes_no", _mme_read, _yes_no(yes_no.parse_mme), _mme),
    "mmbench": Benchmark("choice", _mmbench_read, _choice("mmbench"), _mmbench),
    "mmmu": Benchmark("choice", _mmmu_read, _mmmu, _average),
    "mmstar": Benchmark("choice", _mmstar_read, _choice("mmstar"), _mmstar),
    "ai2d": Benchmark("choice", _reader("choice"), _choice("ai2d"), _named("accuracy")),
    "ocrbench": Benchmark(
        "text", _reader("text", categories=("category", "question_type", "type")), _ocrbench, _ocrbench_summary
    ),
    "refcoco": Benchmark("box", _refcoco_read, _refcoco, _average),
}
