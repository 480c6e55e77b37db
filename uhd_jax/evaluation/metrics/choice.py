"""Which option an answer names, in the readings of the benchmarks and the harnesses; circular evaluation.

Reading an answer decides points: a model that says "The answer is (B)" is right under one rule and wrong under another.
Source: spec ecosystem section 2; each reader names whose it is.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
NONE = ""  # no option could be read


def letters_of(options: Sequence[str]) -> str:
    """ "ABCD" of four options."""
    return LETTERS[: len(options)]


def scienceqa(prediction: str, options: Sequence[str]) -> str:
    """LLaVA's script: the letter alone, a letter with ". " behind it at the start, or "The answer is X."."""
    letters = letters_of(options)
    if prediction in tuple(letters):
        return prediction
    if prediction[:1] in tuple(letters) and prediction[1:3] == ". ":
        return prediction[0]
    found = re.findall(r"The answer is ([A-Z]).", prediction)
    return found[0] if len(found) == 1 and found[0] in letters else NONE


def scienceqa_lmms(prediction: str, options: Sequence[str]) -> str:
    """lmms-eval's: the letter alone in either case, or a capital with "." behind it at the start."""
    prediction = prediction.strip()
    if len(prediction) == 1:
        return prediction.upper()
    return prediction[0] if prediction[:1].isupper() and prediction[1] == "." else NONE


def mmstar(prediction: str, options: Sequence[str]) -> str:
    """MMStar's script: the first letter, or that behind "(", "option " or "the answer is ", in either case."""
    text = prediction.lower().strip().replace("\n", " ")
    letters = letters_of(options).lower()
    for lead in ("", "(", "option ", "the answer is "):
        if text.startswith(lead) and text[len(lead) : len(lead) + 1] in tuple(letters):
            return text[len(lead)].upper()
    return NONE


def ai2d_lmms(prediction: str, options: Sequence[str]) -> str:
    """lmms-eval's: a capital with "." at the start, else the answer without punctuation if that is one letter."""
    if found := re.match(r"\s*([A-Z])\.", prediction):
        return found[1]
    bare = prediction.translate(str.maketrans("", "", string.punctuation)).upper()
    return bare if len(bare) == 1 and bare in LETTERS else NONE


def mmmu(prediction: str, options: Sequence[str]) -> str:
    """MMMU's script: the last "(B)", else the last letter before a space, else "B."; else an option's text.

    The script guesses at random where it finds nothing; here that is no option, which is wrong.
    """
    text = prediction
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text = f" {text} "
    letters = letters_of(options)
    for written, placed in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in letters if written.format(letter) in text]:
            return _last(found, [text.rfind(placed.format(letter)) for letter in found])
    if len(text.split()) > 5:
        found = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in text.lower()]
        by_letter = dict(zip(letters, options, strict=True))
        if found:
            return _last(found, [text.lower().rfind(by_letter[letter].lower()) for letter in found])
    return NONE


def _last(found: Sequence[str], places: Sequence[int]) -> str:
    return found[places.index(max(places))]


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SAID = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def vlmevalkit(prediction: str, options: Sequence[str]) -> str:
    """VLMEvalKit's `exact_matching`, which is MMBench's own without a language model as judge.

    The one letter that stands alone among the answer's last five words; else "answer is X"; else the one option whose
    text occurs, unless the answer is more than twice as long as all options. Refusals are read as "Z".
    """
    letters = letters_of(options)
    if any(refusal in prediction for refusal in _REFUSALS):
        return "Z"
    words = prediction.translate(str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:
        return "Z"
    if (said := _SAID.search(prediction)) and said[1].upper() in letters:
        return said[1].upper()
    return _option_text(prediction, options, limit=2 * sum(len(option) for option in options))


def _option_text(prediction: str, options: Sequence[str], limit: float = float("inf")) -> str:
    text = prediction.lower()
    if len(text) > limit:
        return NONE
    found = [letter for letter, option in zip(LETTERS, options, strict=False) if option.lower() in text]
    return found[0] if len(found) == 1 else NONE


def mmbench_lmms(prediction: str, options: Sequence[str]) -> str:
    """lmms-eval's MMBench without a judge: the one of A to E that stands alone or between signs, else an option's text,
    else what `lmms` reads."""
    words = prediction.split()
    signs = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
    for sign in signs:
        found = [letter for letter in "ABCDE" if sign.format(letter) in words]
        if len(found) == 1 and not (sign == "{}" and "A" in words and len(words) > 3):  # A may be an article
            return found[0]
    return _option_text(prediction, options) or lmms(prediction, options)


_PHRASES = [
    f"{start}{noun} is"
    for noun in ("answer", "option", "choice")
    for start in ("the ", "", "the correct ", "correct ", "the best ", "best ")
    if (noun, start) not in (("option", "the "), ("option", ""), ("choice", "the best "), ("choice", "best "))
]
_PHRASES += ["i choose", "i select", "i pick", "my answer is", "my choice is"]
_PHRASES += ["옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))


def lmms(prediction: str, options: Sequence[str]) -> str:
    """lmms-eval's general reader: of all ways in which letters occur the most telling, of those the last.

    From most to least telling: at the start, at the end, behind "the answer is" and the like, (B), B., B:, B), B.
    """
    text = prediction.strip()
    for sign in ",.!?;:'\"":
        text = text.strip(sign)
    text, letters = f" {text} ", letters_of(options)
    found = [(rank, text.rfind(form.format(x)), x) for form, rank in _FORMS for x in letters if form.format(x) in text]
    lower = text.lower()
    for phrase in _PHRASES:
        if (start := lower.find(phrase)) >= 0:
            places = [(text.find(letter, start + len(phrase)), letter) for letter in letters]
            found += [(7, place, letter) for place, letter in places if place >= 0]
    bare = text.strip()
    if bare[:1] in tuple(letters) and not bare[1:2].isalpha():
        found.append((10, 0, bare[0]))
    if bare[-1:] in tuple(letters) and not bare[-2:-1].isalpha():
        found.append((9, len(text) - 1, bare[-1]))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    if not prediction.strip() or not found:
        return NONE
    best = max(found, key=lambda one: one[:2])
    return next(one for one in found if one[:2] == best[:2])[2]


def circular(results: Sequence[tuple[str, bool]]) -> dict[str, bool]:
    """MMBench's circular evaluation: a question is right when it is in every rotation of its options.

    Args:
      results: (question, whether this rotation of it is right).
    """
    right: dict[str, bool] = {}
    for question, hit in results:
        right[question] = right.get(question, True) and hit
    return right
