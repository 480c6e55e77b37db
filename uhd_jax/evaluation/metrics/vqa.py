"""The accuracy of VQAv2, TextVQA and VizWiz: a prediction against the answers of ten people.

Source: the evaluation of the VQA challenge (Antol et al., 2015), and of Pythia / M4C for TextVQA; spec ecosystem
section 2. An answer that at least three of the other nine people gave is right. It is compared after a normalisation
that writes number words as digits, drops articles and most punctuation, and gives contractions their apostrophes back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from uhd_jax.evaluation.metrics.styles import MetricError, Style, mean

_ARTICLES = ("a", "an", "the")
_NUMBERS = "none zero one two three four five six seven eight nine ten".split()
_DIGITS = {word: str(max(0, number - 1)) for number, word in enumerate(_NUMBERS)}
# Contractions with one apostrophe are recognised without it, those with two where one of them is missing.
_CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
""".split()
# The published table is not regular everywhere; these are its other entries.
_IRREGULAR = {
    "'ow'sat": "'ow's'at",
    "'ows'at": "'ow's'at",
    "ow's'at": "'ow's'at",
    "somebody'd": "somebodyd",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
}
_MISSING = ("y'all'dve",)  # which the rule would recognise by another name than the table


def _contraction_table() -> dict[str, str]:
    table = {}
    for word in _CONTRACTIONS:
        places = [place for place, letter in enumerate(word) if letter == "'"]
        for place in places:
            table[word[:place] + word[place + 1 :]] = word
    return table | _IRREGULAR


CONTRACTIONS = _contraction_table()
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")  # the published expression means to keep one behind a digit too, and does not
_PERIOD_VLMEVALKIT = re.compile(r"(?<!\d)\.(?!\d)")
_MOST_PERIODS = 32  # the published code gives re.UNICODE, which is 32, in the place of a count


def normalise(text: str, style: Style = "official") -> str:
    """An answer as the VQA challenge compares it: punctuation, then articles, numbers and contractions."""
    removed = text
    number = _COMMA_IN_NUMBER.search(text)
    for sign in _PUNCTUATION:
        alone = sign + " " in text or " " + sign in text
        removed = removed.replace(sign, "" if alone or number else " ")
    period = _PERIOD_VLMEVALKIT if style == "vlmevalkit" else _PERIOD
    removed = period.sub("", removed, count=_MOST_PERIODS)
    words = (_DIGITS.get(word, word) for word in removed.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalise_textvqa(text: str) -> str:
    """An answer as TextVQA compares it: commas and question marks go first, and "'s" becomes a word."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(_one_line(text))


def accuracy(prediction: str, answers: Sequence[str], benchmark: str = "vqav2", style: Style = "official") -> float:
    """Mean over the people of min(1, others who gave the prediction / 3).

    Args:
      prediction: the model's answer.
      answers: one of each person, ten of them; other numbers are computed alike.
      benchmark: "vqav2", "textvqa" or "vizwiz", which differ in their normalisation.
      style: official: VQAv2 and VizWiz normalise only where people disagree; TextVQA always, by its own rule.
        lmms-eval: always, VizWiz by TextVQA's rule. vlmevalkit: always by one rule.

    Raises:
      MetricError: there are no answers.
    """
    if not answers:
        raise MetricError("no reference answers; the split of a hidden test set cannot be scored here")
    answers = [_one_line(answer) for answer in answers]
    if style != "vlmevalkit" and (benchmark == "textvqa" or (benchmark == "vizwiz" and style == "lmms-eval")):
        answers, prediction = [normalise_textvqa(answer) for answer in answers], normalise_textvqa(prediction)
    else:
        prediction = _one_line(prediction)
        if style != "official" or len(set(answers)) > 1:
            answers = [normalise(answer, style) for answer in answers]
            prediction = normalise(prediction, style)
    same = sum(answer == prediction for answer in answers)
    return mean([min(1.0, (same - (answer == prediction)) / 3) for answer in answers])


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
