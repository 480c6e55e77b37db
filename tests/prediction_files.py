"""Made predictions of every benchmark, 200 rows each, and what the harnesses' own code makes of them.

`python tests/prediction_files.py` writes tests/golden/evaluation/, where lmms-eval and VLMEvalKit are installed (the
package ms-vlmeval, or a clone on PYTHONPATH). The tests of the metrics read these files; where a harness is installed
they also ask it again.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
import string
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "golden" / "evaluation"
ROWS = 200
LETTERS = string.ascii_uppercase

Row = dict[str, Any]

_WORDS = "stop sign|red|two|dog's bowl|St. John's|10:30 am|3.50|1,000|dont walk|a|the end|Coca-Cola|o'clock|e.g. this"
_WORDS += "|none|coca cola|New York|5%|12/04/1999|yall're|what's up?|it's 5.|50|no|yes|nothing at all|(left)|B&B|café"
WORDS = _WORDS.split("|")
SHAPES = (
    "{}",
    "{}.",
    "The {}",
    "the {}",
    "a {}",
    "{} ",
    " {}",
    "{}!",
    "It is {}",
    "{}?",
    "{}\n",
    "{},",
    "'{}'",
    "{}'s",
)


def _said(rng: random.Random, answer: str) -> str:
    """An answer as models write it."""
    text = rng.choice(SHAPES).format(answer) if rng.random() < 0.6 else answer
    return rng.choice((str, str.upper, str.lower, str.title))(text) if rng.random() < 0.4 else text


def _slip(rng: random.Random, text: str) -> str:
    """With some letters changed, doubled or lost."""
    letters = list(text)
    for _ in range(rng.randint(0, 3)):
        place = rng.randrange(len(letters) + 1)
        letters[place : place + rng.randint(0, 1)] = rng.choice(("", "x", " ", "e"))
    return "".join(letters)


def _people(rng: random.Random, index: int) -> Row:
    main, others = rng.choice(WORDS), rng.sample(WORDS, 3)
    if index % 10 == 0:
        answers = [main] * 10
    else:
        answers = [main if rng.random() < 0.5 else _said(rng, rng.choice((main, *others))) for _ in range(10)]
    return {"prediction": _said(rng, rng.choice((main, main, *others))), "answers": answers}


def _document(rng: random.Random, index: int) -> Row:
    answers = [rng.choice(WORDS) + f" {rng.randint(0, 99)}" * rng.randint(0, 1) for _ in range(rng.randint(1, 3))]
    if index % 20 == 0:
        return {"prediction": "abxy" if index % 40 else "", "answers": ["abcd"]}  # the threshold itself; nothing said
    return {"prediction": _slip(rng, _said(rng, rng.choice((*answers, rng.choice(WORDS))))), "answers": answers}


def _chart(rng: random.Random, index: int) -> Row:
    number = rng.choice((0, 0.1, 3, 20, 47.5, -12, 1999, 100000))
    answer = rng.choice((str(number), f"{number}%", rng.choice(WORDS)))
    near = number * rng.choice((0.94, 0.95, 0.951, 1, 1.05, 1.0499, 1.06))
    said = rng.choice((f"{near:g}", f"{near:g}%", f" {number}", f"{number:,}", f"{number}.", f"{number / 100:g}"))
    return {"prediction": rng.choice((said, answer, _said(rng, answer))), "answers": [answer], "split": index % 2}


def _exact(rng: random.Random, index: int) -> Row:
    answer = rng.choice(("yes", "no", "left", "dining table", "t-shirt", "blue", "man"))
    return {"prediction": _said(rng, rng.choice((answer, answer, "blue"))), "answers": [answer]}


_OPTIONS = (
    "a red apple",
    "banana",
    "the cat",
    "Option",
    "5",
    "Mount Everest",
    "blue",
    "none of these",
    "dog",
    "A tree",
)
_SPOKEN = (
    "{x}",
    "{x}.",
    "({x})",
    "{x}. {text}",
    "{l}",
    "The answer is {x}.",
    "the answer is {l}",
    "Answer: {x}",
    "{x}: {text}",
)
_SPOKEN += (
    "{text}",
    "It is {text}.",
    "I think it is {x} because it looks so",
    "{x} or {y}",
    "({x}) and not ({y})",
    "{x})",
    "",
)
_SPOKEN += (
    "Option {x}",
    "A dog is in the picture",
    "The correct answer is **{x}**. Here is why: it can be seen well",
    "I don't know",
)
_SPOKEN += (
    "Because the picture shows {text}, I would say that it must be so.",
    "option {l}",
    "{x} {y}",
    "**{x}**",
    "{x},{y}",
)
_SPOKEN += (
    "I'm sorry, but without the image provided I cannot say",
    "Z",
    "The best option is {x}",
    "{x}\n{text}",
    "{l}.",
    "1. {x}",
)


def _choice(rng: random.Random, index: int, most: int = 4) -> Row:
    options = rng.sample(_OPTIONS, rng.randint(3, most) if most > 4 else 4)
    answer = rng.randrange(len(options))
    chosen = answer if rng.random() < 0.6 else rng.randrange(len(options))
    other = rng.randrange(len(options))
    spoken = rng.choice(_SPOKEN).format(
        x=LETTERS[chosen], l=LETTERS[chosen].lower(), y=LETTERS[other], text=options[chosen]
    )
    group = f"group {index % 6}"
    return {"prediction": spoken, "options": options, "answer": LETTERS[answer], "category": group}


def _circular(rng: random.Random, index: int) -> Row:
    """Rotations of 50 questions, four of each; most of a question's answers agree."""
    question, rotation = index % 50, index // 50
    own = random.Random(question)
    options = own.sample(_OPTIONS, 4)
    answer, wrong = own.randrange(4), own.random() < 0.4
    turned = options[rotation:] + options[:rotation]
    right = turned.index(options[answer])
    chosen = (right + 1) % 4 if wrong and rng.random() < 0.5 else right
    shape = rng.choice(_SPOKEN[:10])
    spoken = shape.format(x=LETTERS[chosen], l=LETTERS[chosen], y="", text=turned[chosen])
    index = question + 1 + rotation * 1_000_000
    return {
        "prediction": spoken,
        "options": turned,
        "answer": LETTERS[right],
        "index": index,
        "category": f"c{question % 5}",
    }


def _mmmu(rng: random.Random, index: int) -> Row:
    subject = rng.choice(("Art", "Finance", "Math"))
    if index % 3:
        return _choice(rng, index) | {"id": f"validation_{subject}_{index}", "open": False}
    answer = rng.choice(("3.5", "1,200", "-4", "0.25", "x", "photosynthesis", "7", "red blood cells", "2e5", "1/2"))
    spoken = rng.choice(
        (
            "{a}",
            "The answer is {a}.",
            "so x = {a}",
            "It is about {a} units. Thus {a}",
            "I think 12",
            "First 3. So the result is {a}\nDone",
        )
        + ("a = {a}.", "We have 1,200 and 3.50 is final", "Could be {a} or 9", "{a}!", "", "Therefore, the answer:")
    ).format(a=answer)
    return {"prediction": spoken, "answers": [answer], "id": f"validation_{subject}_{index}", "open": True}


_YES_NO = (
    "yes",
    "no",
    "Yes",
    "No",
    "Yes.",
    "No.",
    "Yes, there is a dog.",
    "No, there is not.",
    "There is no dog.",
    "y",
    "n",
    "",
)
_YES_NO += (
    "There is a dog.",
    " yes",
    "NO",
    "not sure",
    "I cannot say. No",
    "yes and no",
    "Nope",
    "yes!",
    "It is not, yes",
    "None",
    "Y.",
)


def _pope(rng: random.Random, index: int) -> Row:
    split = ("random", "popular", "adversarial")[index % 3]
    answer = rng.choice(("yes", "no"))
    said = answer if rng.random() < 0.5 else rng.choice(_YES_NO)
    return {"prediction": said, "answer": answer, "category": split}


def _mme(rng: random.Random, index: int) -> Row:
    categories = ("existence", "count", "OCR", "code_reasoning", "text_translation")
    pair = index // 2
    answer = ("yes", "no")[index % 2]
    said = answer.title() if rng.random() < 0.6 else rng.choice(_YES_NO)
    category = categories[pair % len(categories)]
    return {"prediction": said, "answer": answer, "category": category, "image": f"{category}/{pair}.jpg"}


def _ocr(rng: random.Random, index: int) -> Row:
    from uhd_jax.evaluation.metrics.text import OCRBENCH

    category = OCRBENCH[index % len(OCRBENCH)]
    answers = [r"\frac { a } { b } + 2" if "Math" in category else rng.choice(WORDS) for _ in range(rng.randint(1, 2))]
    said = _said(rng, rng.choice((*answers, rng.choice(WORDS))))
    if rng.random() < 0.2:
        said = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in said)  # full width
    if "Math" in category:
        said = rng.choice((r"\frac{a}{b}+2", r"The formula is \frac {a}{ b } + 2.", r"\frac{a}{c}"))
    return {"prediction": said, "answers": answers, "category": category}


def _boxes(rng: random.Random, index: int) -> Row:
    width, height = rng.choice(((640, 480), (333, 500), (1200, 800)))
    x, y = rng.uniform(0, 0.6), rng.uniform(0, 0.6)
    box = [x, y, x + rng.uniform(0.05, 0.4), y + rng.uniform(0.05, 0.4)]
    near = [b + rng.uniform(-0.08, 0.08) for b in box] if rng.random() < 0.7 else [rng.random() for _ in box]
    shares = [f"{max(0, n):.2f}" for n in near]
    thousandths = [str(round(1000 * max(0, n))) for n in near]
    text = rng.choice(
        (
            "[{}, {}, {}, {}]",
            "[{},{},{},{}]",
            "The box is [{}, {}, {}, {}].",
            "[{} {} {} {}]",
            "({}, {}), ({}, {})",
            "{}, {} and {}",
        )
        + ("no idea", "[-{}, {}, {}, {}]")
    )
    said = text.format(*(shares if rng.random() < 0.6 else thousandths))
    return {"prediction": said, "box": [round(b, 4) for b in box], "width": width, "height": height}


MAKERS = {
    "textvqa": _people,
    "vqav2": _people,
    "vizwiz": _people,
    "docvqa": _document,
    "chartqa": _chart,
    "gqa": _exact,
    "scienceqa": lambda rng, index: _choice(rng, index, most=5),
    "pope": _pope,
    "mme": _mme,
    "mmbench": _circular,
    "mmmu": _mmmu,
    "mmstar": _choice,
    "ai2d": _choice,
    "ocrbench": _ocr,
    "refcoco": _boxes,
}


def make_rows(benchmark: str) -> list[Row]:
    rng = random.Random(f"predictions of {benchmark}")
    return [MAKERS[benchmark](rng, index) for index in range(ROWS)]


def read(benchmark: str) -> tuple[list[Row], dict[str, Any]]:
    """The stored rows, each with a score of either harness, and the harnesses' summaries."""
    *lines, last = (FOLDER / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], json.loads(last)


def with_scores(benchmark: str, rows: list[Row], harnesses: dict[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    summaries, rows = {}, [dict(row) for row in rows]
    for name, ask in harnesses.items():
        with contextlib.redirect_stdout(io.StringIO()):
            scores, summary = ask(benchmark, rows)
        for row, score in zip(rows, scores, strict=True):
            row[name] = score
        summaries[name] = summary
    return rows, summaries


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    harnesses = importlib.import_module("harnesses")
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in MAKERS:
        rows, summaries = with_scores(
            name, make_rows(name), {"lmms-eval": harnesses.lmms, "vlmevalkit": harnesses.vlmevalkit}
        )
        lines = [json.dumps(one, ensure_ascii=False) for one in (*rows, summaries)]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(name, summaries)
