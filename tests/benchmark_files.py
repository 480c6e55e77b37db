"""Small files in the forms that benchmarks are published in: (files of data, options of the task) per form."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (24, 30)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def coded(seed: int = 0) -> str:
    return base64.b64encode(picture(seed)).decode()


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(path: Path, rows: list[dict]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def table(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


TEN = ["stop"] * 6 + ["Stop sign", "the stop", "go", "stop."]


def _textvqa(folder):
    write(folder / "train_images/abc.jpg", picture())
    row = {"question_id": 34602, "image_id": "abc", "question": "what is it?", "answers": TEN, "ocr_tokens": ["STOP"]}
    return [write(folder / "TextVQA_val.json", {"dataset_type": "val", "data": [row]})], {}


def _textvqa_tsv(folder):
    row = {"index": 1, "image": coded(), "question": "what\nis it?", "answer": str(TEN)}
    return [table(folder / "TextVQA_VAL.tsv", [row])], {}


def _textvqa_parquet(folder):
    image = {"bytes": picture(), "path": None}
    rows = [{"question_id": n, "image": image, "question": "what is it?", "answers": TEN} for n in range(5)]
    return [parquet(folder / "val.parquet", rows)], {}


def _textvqa_llava(folder):
    write(folder / "train_images/abc.jpg", picture())
    text = "what is it?\nReference OCR token: STOP\nAnswer the question using a single word or phrase."
    questions = lines(folder / "q.jsonl", [{"question_id": "abc", "image": "abc.jpg", "text": text}])
    answers = write(folder / "val.json", {"data": [{"question_id": "abc", "answers": TEN}]})
    return [questions], {"annotations": [answers], "images": folder / "train_images"}


def _vqav2(folder):
    write(folder / "val2014/COCO_val2014_000000000042.jpg", picture())
    asked = {"question_id": 42000, "image_id": 42, "question": "What is it?"}
    answered = [{"answer": answer, "answer_confidence": "yes", "answer_id": n} for n, answer in enumerate(TEN)]
    questions = write(folder / "questions.json", {"info": {}, "questions": [asked]})
    notes = {"question_id": 42000, "answers": answered, "answer_type": "other", "multiple_choice_answer": "stop"}
    return [questions], {"annotations": [write(folder / "annotations.json", {"annotations": [notes]})]}


def _vizwiz(folder):
    write(folder / "val/VizWiz_val_0.jpg", picture())
    answers = [{"answer": answer, "answer_confidence": "yes"} for answer in TEN]
    row = {"image": "VizWiz_val_0.jpg", "question": "What is it?", "answers": answers, "answer_type": "other"}
    return [write(folder / "val.json", [row])], {}


def _docvqa(folder):
    write(folder / "documents/a.png", picture())
    row = {"questionId": 7, "question": "What?", "image": "documents/a.png", "answers": ["stop", "Stop!"]}
    return [write(folder / "val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [row]})], {}


def _chartqa(folder):
    write(folder / "png/1.png", picture())
    row = {"imgname": "1.png", "query": "How many?", "label": "20"}
    return [write(folder / f"test_{part}.json", [row, row]) for part in ("human", "augmented")], {}


def _gqa(folder):
    write(folder / "images/n1.jpg", picture())
    rows = {"20": {"question": "Is it red?", "imageId": "n1", "answer": "yes"}}
    return [write(folder / "testdev_balanced_questions.json", rows)], {"images": folder / "images"}


def _scienceqa(folder):
    write(folder / "test/4/image.png", picture())
    row = {"question": "Which?", "choices": ["a cat", "a dog"], "answer": 1, "hint": "Look.", "image": "image.png"}
    rows = {"4": row | {"split": "test"}, "5": row | {"split": "train"}, "6": row | {"split": "test", "image": None}}
    return [write(folder / "problems.json", rows)], {}


def _pope(folder):
    write(folder / "val2014/c.jpg", picture())
    rows = [
        {"question_id": n, "image": "c.jpg", "text": "Is there a dog?", "label": "yes no".split()[n]} for n in (0, 1)
    ]
    files = [lines(folder / f"coco_pope_{split}.json", rows) for split in ("random", "popular")]
    return files, {"images": folder / "val2014"}


def _mme(folder):
    for category in ("existence", "code_reasoning"):
        write(folder / category / "0001.png", picture())
        ask = "Is there a dog? Please answer yes or no."
        write(folder / category / "0001.txt", f"{ask}\tYes\n{ask}\tNo\n")
    return [folder], {}


def _mme_parquet(folder):
    image = {"bytes": picture(), "path": "a.png"}
    rows = [
        {"question_id": "existence/a.png", "image": image, "question": f"{q} Please answer yes or no.", "answer": a}
        | {"category": "existence"}
        for q, a in (("Dog?", "Yes"), ("Cat?", "No"))
    ]
    return [parquet(folder / "test.parquet", rows)], {}


def _mmbench(folder):
    row = {"question": "Which?", "hint": "", "A": "cat", "B": "dog", "C": "", "answer": "B", "category": "c"}
    turned = row | {"A": "dog", "B": "cat", "answer": "A"}
    rows = [{"index": 7, **row, "image": coded()}, {"index": 1000007, **turned, "image": "7"}]
    return [table(folder / "mmbench.tsv", rows)], {}


def _mmmu(folder):
    image = {"bytes": picture(), "path": None}
    common = {"image_1": image, "image_2": {"bytes": picture(1), "path": None}, "explanation": ""}
    rows = [
        {"id": "validation_Art_1", "question": "<image 1> or <image 2>?", "options": "['one', 'two']", "answer": "A"}
        | {"question_type": "multiple-choice", **common},
        {"id": "validation_Math_2", "question": "How much is <image 1>?", "options": "[]", "answer": "3.5"}
        | {"question_type": "open", **common},
    ]
    return [parquet(folder / "validation.parquet", rows)], {}


def _mmstar(folder):
    question = "Which?\nOptions: A: cat, B: dog, C: cow, D: owl"
    row = {"index": 0, "question": question, "image": picture(), "answer": "B", "category": "math", "l2_category": "x"}
    return [parquet(folder / "mmstar.parquet", [row])], {}


def _ai2d(folder):
    image = {"bytes": picture(), "path": None}
    rows = [{"question": "Which?", "options": ["cat", "dog"], "answer": "1", "image": image}]
    return [parquet(folder / "ai2d.parquet", rows)], {}


def _ocrbench(folder):
    write(folder / "OCRBench_Images/a.jpg", picture())
    row = {"dataset_name": "IIIT5K", "image_path": "a.jpg", "question": "what is written?", "answers": ["STOP"]}
    rows = [row | {"type": "Regular Text Recognition", "id": 0}]
    return [write(folder / "OCRBench.json", rows)], {"images": folder / "OCRBench_Images"}


def _refcoco(folder):
    write(folder / "a.jpg", picture(0, (100, 200)))
    row = {"img_path": "a.jpg", "expression": "the <p>left dog</p>", "bbox": [20, 10, 100, 60]}
    return [lines(folder / "REC_refcoco_unc_val.jsonl", [row | {"dataset_name": "refcoco", "height": 100}])], {}


# name -> (task, maker, number of samples, a prompt's beginning, an answer that is right)
FORMS = {
    "textvqa json": ("textvqa", _textvqa, 1, "what is it?\nAnswer", "Stop."),
    "textvqa tsv": ("textvqa", _textvqa_tsv, 1, "what\nis it?\nAnswer", "Stop."),
    "textvqa parquet": ("textvqa", _textvqa_parquet, 5, "what is it?\nAnswer", "Stop."),
    "textvqa of llava": ("textvqa", _textvqa_llava, 1, "what is it?\nReference OCR token: STOP\nAnswer", "Stop."),
    "vqav2 json": ("vqav2", _vqav2, 1, "What is it?\nAnswer", "the stop"),
    "vizwiz json": ("vizwiz", _vizwiz, 1, "What is it?\nAnswer", "the stop"),
    "docvqa json": ("docvqa", _docvqa, 1, "What?\nAnswer", "Stop"),
    "chartqa json": ("chartqa", _chartqa, 4, "How many?\nAnswer", "20.5"),
    "gqa json": ("gqa", _gqa, 1, "Is it red?\nAnswer", "Yes."),
    "scienceqa json": ("scienceqa", _scienceqa, 1, "Look.\nWhich?\nA. a cat\nB. a dog\nAnswer with", "B"),
    "pope lines": ("pope", _pope, 4, "Is there a dog?\nAnswer", None),
    "mme folder": ("mme", _mme, 4, "Is there a dog?\nAnswer", None),
    "mme parquet": ("mme", _mme_parquet, 2, "Dog?\nAnswer", None),
    "mmbench tsv": ("mmbench", _mmbench, 2, "Which?\nA. cat\nB. dog\nAnswer with", None),
    "mmmu parquet": ("mmmu", _mmmu, 2, "<image 1> or <image 2>?\nA. one\nB. two\nAnswer with", None),
    "mmstar parquet": ("mmstar", _mmstar, 1, "Which?\nOptions: A: cat", "B"),
    "ai2d parquet": ("ai2d", _ai2d, 1, "Which?\nA. cat\nB. dog\nAnswer with", "B"),
    "ocrbench json": ("ocrbench", _ocrbench, 1, "what is written?", "It says stop."),
    "refcoco lines": ("refcoco", _refcoco, 1, "Please provide the bounding box", "[0.1, 0.1, 0.5, 0.6]"),
}
