"""Asks the harnesses' own code for scores of made predictions: (benchmark, rows) -> scores per row, summary.

Not part of the project's dependencies; see prediction_files.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

Row = dict[str, Any]
Scores = tuple[list[float], dict[str, float]]


def _mean(scores: list[float]) -> dict[str, float]:
    return {"score": sum(scores) / len(scores)}


def _each(score: Callable[[Row], float], rows: list[Row]) -> Scores:
    scores = [float(score(copy.deepcopy(row))) for row in rows]
    return scores, _mean(scores)


def lmms(benchmark: str, rows: list[Row]) -> Scores:
    """lmms-eval's."""
    return globals()[f"_lmms_{benchmark}"](rows)


def _lmms_textvqa(rows):
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results as process

    return _each(lambda row: process(row | {"question_id": 0}, [row["prediction"]])["exact_match"], rows)


def _lmms_vizwiz(rows):
    from lmms_eval.tasks.vizwiz_vqa.utils import vizwiz_vqa_process_results as process

    return _each(lambda row: process(row | {"question_id": 0}, [row["prediction"]])["exact_match"], rows)


def _lmms_vqav2(rows):
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results as process

    def score(row):
        answers = [{"answer": answer, "answer_id": number} for number, answer in enumerate(row["answers"])]
        return process({"question_id": 0, "answers": answers}, [row["prediction"]])["exact_match"]

    return _each(score, rows)


def _lmms_docvqa(rows):
    from lmms_eval.api.metrics import anls

    return _each(lambda row: anls(row["answers"], [row["prediction"]])["anls"], rows)


def _lmms_chartqa(rows):
    from lmms_eval.tasks.chartqa.utils import chartqa_process_results as process

    def score(row):
        return process({"answer": row["answers"][0], "type": "human_test"}, [row["prediction"]])["relaxed_overall"]

    return _each(score, rows)


def _lmms_exact(predictions, references):
    from lmms_eval.api.metrics import exact_match_hf_evaluate as match

    return match(predictions, references, ignore_case=True, ignore_punctuation=True)["exact_match"]


def _lmms_gqa(rows):
    return _each(lambda row: _lmms_exact([row["prediction"]], row["answers"]), rows)


def _lmms_ai2d(rows):
    from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter

    reader = MultiChoiceRegexFilter(r"([A-Z])\.", 0, ignore_case=True, ignore_punctuation=True)
    read = reader.apply([[row["prediction"]] for row in rows], rows)
    scores = [float(_lmms_exact([said], [row["answer"]])) for said, row in zip(read, rows, strict=True)]
    return scores, _mean(scores)


def _lmms_scienceqa(rows):
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results as process

    def score(row):
        doc = {"choices": row["options"], "answer": ord(row["answer"]) - ord("A")}
        return process(doc, [row["prediction"]])["exact_match"]

    return _each(score, rows)


def _lmms_pope(rows):
    from lmms_eval.tasks.pope import utils

    results = [utils.pope_process_results(row | {"question_id": 0}, [row["prediction"]]) for row in rows]
    names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
    summary = {
        name.removesuffix("_score"): getattr(utils, f"pope_aggregate_{name}")([one[f"pope_{name}"] for one in results])
        for name in names
    }
    return [one["pope_accuracy"]["score"] for one in results], summary


def _lmms_mme(rows):
    from lmms_eval.tasks.mme import utils

    results = [utils.mme_process_results(row | {"question_id": row["image"]}, [row["prediction"]]) for row in rows]
    summary = {
        name: utils.mme_aggregate_results([one[key] for one in results if key in one])
        for name, key in (("perception", "mme_perception_score"), ("cognition", "mme_cognition_score"))
    }
    return [next(iter(one.values()))["score"] for one in results], summary


def _lmms_mmbench(rows):
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    judge = MMBench_Evaluator()
    data = [
        {
            "index": row["index"],
            "question": "?",
            "answer": row["answer"],
            "prediction": row["prediction"].strip(),
            "category": row["category"],
            "L2-category": row["category"],
            **dict(zip("ABCD", row["options"], strict=True)),
        }
        for row in rows
    ]
    overall, _, _ = judge.eval_result(data, eval_method="static")
    read = [judge.prefetch_answer(item) or extract_mcq_answer(item["prediction"], list("ABCD")) for item in data]
    return [float(one == row["answer"]) for one, row in zip(read, rows, strict=True)], {"score": float(overall)}


def _lmms_mmmu(rows):
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils
    from lmms_eval.tasks.mmmu import utils

    def doc(row):
        kind = "open" if row["open"] else "multiple-choice"
        answer = row["answers"][0] if row["open"] else row["answer"]
        return {"id": row["id"], "question_type": kind, "answer": answer, "options": str(row.get("options", []))}

    # Where no option can be read the code guesses. A guess of no option makes that comparable.
    with mock.patch.object(mmmu_mcq_utils.random, "choice", lambda _: "?"):
        results = [utils.mmmu_process_results(doc(row), [row["prediction"]])["mmmu_acc"] for row in rows]
    scores = [float(utils.evaluate_mmmu([one])[1]["acc"]) for one in results]
    return scores, {"score": utils.mmmu_aggregate_results(results)}


def _lmms_mmstar(rows):
    from lmms_eval.tasks.mmstar import utils

    docs = [row | {"index": 0, "l2_category": row["category"], "category": "x"} for row in rows]
    results = [
        utils.mmstar_process_results(doc, [row["prediction"]])["average"] for doc, row in zip(docs, rows, strict=True)
    ]
    return [one["score"] for one in results], {"score": utils.mmstar_aggregate_results(results)}


def _lmms_ocrbench(rows):
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results as process

    def score(row):
        dataset = "HME100k" if "Math" in row["category"] else "IIIT5K"
        doc = {"answer": row["answers"], "dataset": dataset, "question_type": row["category"]}
        return process(doc, [row["prediction"]])["ocrbench_accuracy"]["score"]

    scores, _ = _each(score, rows)
    return scores, {"score": sum(scores) / 1000}


def _lmms_refcoco(rows):
    from lmms_eval.tasks.refcoco import utils_rec

    def iou(row):
        doc = {"question_id": 0, "answer": "?", "bbox": row["box"]}
        one = utils_rec.refcoco_bbox_rec_process_result(doc, [row["prediction"]])["refcoco_IoU"]
        return utils_rec.compute_iou(one["bbox"], one["pred"])

    scores = [float(iou(row)) for row in rows]
    return scores, {"score": sum(score >= 0.5 for score in scores) / len(rows)}


def vlmevalkit(benchmark: str, rows: list[Row]) -> Scores:
    """VLMEvalKit's."""
    return globals()[f"_kit_{benchmark}"](rows)


def _kit_text(rows, method, dataset):
    from vlmeval.dataset.utils.vqa_eval import hit_calculate, process_line

    lines = [{"answer": str(row["answers"]), "prediction": row["prediction"]} for row in rows]
    scores = [float(hit) for hit in hit_calculate([process_line(line, method=method) for line in lines], dataset)]
    return scores, _mean(scores)


def _kit_textvqa(rows):
    return _kit_text(rows, "vqa_score", "TextVQA_VAL")


def _kit_vqav2(rows):
    return _kit_text(rows, "vqa_score", "VQAv2")


def _kit_vizwiz(rows):
    return _kit_text(rows, "vqa_score", "VizWiz")


def _kit_docvqa(rows):
    return _kit_text(rows, "anls", "DocVQA_VAL")


def _kit_chartqa(rows):
    return _kit_text(rows, "relaxed_accuracy", "ChartQA_TEST")


def _kit_gqa(rows):
    return _kit_text(rows, "accuracy", "GQA_TestDev_Balanced")


def _kit_choice(rows):
    from vlmeval.dataset.utils.multiple_choice import eval_vanilla

    def score(row):
        options = row.get("options") or [row["answers"][0], "Other Answers"]
        item = dict(zip("ABCDE", options, strict=False))
        item |= {"prediction": row["prediction"], "GT": row.get("answer", "A"), "question": "?"}
        return eval_vanilla(None, item)["hit"]

    return _each(score, rows)


_kit_scienceqa = _kit_mmstar = _kit_ai2d = _kit_mmmu = _kit_choice


def _kit_mmbench(rows):
    import pandas as pd
    from vlmeval.dataset.utils.multiple_choice import eval_circular_group, eval_vanilla

    data = pd.DataFrame(
        [
            {"prediction": row["prediction"], "GT": row["answer"], "question": "?", "group": row["index"] % 10**6}
            | dict(zip("ABCD", row["options"], strict=True))
            for row in rows
        ]
    )
    scores = [float(eval_vanilla(None, data.iloc[n])["hit"]) for n in range(len(data))]
    groups = [eval_circular_group(None, group)["hit"] for _, group in data.groupby("group")]
    return scores, {"score": sum(groups) / len(groups)}


def _kit_yes_no(rows):
    from vlmeval.dataset.utils.yorn import YOrN_Extraction

    return [float(YOrN_Extraction(row["prediction"]).lower() == row["answer"]) for row in rows]


def _kit_pope(rows):
    import pandas as pd
    from vlmeval.dataset.utils import yorn

    scores = _kit_yes_no(rows)
    data = pd.DataFrame(
        {
            "category": [row["category"] for row in rows],
            "answer": [row["answer"].title() for row in rows],
            "extracted": [yorn.YOrN_Extraction(row["prediction"]) for row in rows],
            "score": scores,
        }
    )
    with mock.patch.object(yorn, "load", lambda _: data):
        table = yorn.POPE_rating("")
    overall = table[table["split"] == "Overall"].iloc[0]
    names = {"accuracy": "acc", "precision": "precision", "recall": "recall", "f1": "Overall"}
    return scores, {name: float(overall[column]) / 100 for name, column in names.items()}


def _kit_mme(rows):
    import pandas as pd
    from vlmeval.dataset.utils import yorn

    scores = _kit_yes_no(rows)
    data = pd.DataFrame([row | {"image_path": row["image"], "score": s} for row, s in zip(rows, scores, strict=True)])
    known = {"OCR", "count", "existence", "code_reasoning", "text_translation"}
    others = (
        "artwork celebrity color landmark position posters scene commonsense_reasoning numerical_calculation".split()
    )
    empty = [{"category": name, "image_path": name, "score": 0.0} for name in others if name not in known] * 2
    with mock.patch.object(yorn, "load", lambda _: pd.concat([data, pd.DataFrame(empty)])):
        table = yorn.MME_rating("")
    return scores, {"perception": float(table["perception"].iloc[0]), "cognition": float(table["reasoning"].iloc[0])}


def _kit_ocrbench(rows):
    import pandas as pd
    from vlmeval.dataset.utils import ocrbench

    def final(some):
        saved = {}
        data = pd.DataFrame(
            [{"prediction": r["prediction"], "answer": str(r["answers"]), "category": r["category"]} for r in some]
        )
        with (
            mock.patch.object(ocrbench, "load", lambda _: data),
            mock.patch.object(ocrbench, "dump", lambda scores, _: saved.update(scores)),
            mock.patch.object(ocrbench, "get_intermediate_file_path", lambda *_: ""),
        ):
            ocrbench.OCRBench_eval("")
        return float(saved["Final Score"])

    return [final([row]) for row in rows], {"score": final(rows)}


def _kit_refcoco(rows):
    import numpy as np
    from vlmeval.dataset.refcoco import RefCOCODataset as Data

    def iou(row):
        size = row["width"], row["height"]
        found = Data._parse_prediction(row["prediction"])
        if found is None:
            return 0.0
        return Data._compute_iou(Data._to_absolute(found, *size), np.array(row["box"]) * (*size, *size))

    scores = [float(iou(row)) for row in rows]
    return scores, {"score": sum(score >= 0.5 for score in scores) / len(rows)}
