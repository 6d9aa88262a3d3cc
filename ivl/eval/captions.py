"""CIDEr, BLEU and ROUGE-L of captions, by pycocoevalcap's own scorers (`pip install 'ivl[eval]'`).

The published scripts cut captions into words with Stanford's PTBTokenizer, a Java program; `words` does the same for
the English of captions without Java. METEOR and SPICE are Java programs too and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ivl.errors import UserError

_DROPPED = {'"', "''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
"""Tokens that coco-caption drops. It means to drop brackets as well, but spells them in capitals."""
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")
_WRITTEN_OUT = str.maketrans(
    {"\u2026": "...", "¼": " 1/4 ", "½": " 1/2 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ", "\u00ad": ""}
)
_SPLIT = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
    "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip
_LETTER = r"[\w\u0300-\u036f]"
"""Letter of a word; accents that stand by themselves are part of it."""
_TOKEN = re.compile(
    r"https?://\S+"
    r"|[!?]{2,}"
    r"|-{2,}"
    r"|(?:[a-z]\.){2,}"  # u.s. a.m.
    r"|(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|corp|ltd|prof|gen|sgt|capt|lt|ave|blvd|rd|mt|no(?=\.\s*\d))\."
    r"|\b(?-i:Jan|Feb|Apr|Aug|Sept?|Oct|Nov|Dec)\."
    r"|\b(?:(?-i:[A-Z])\.|[a-z]\.(?=\s+\w))"  # an initial
    r"|'n'|'(?:tis|twas|em|cause|till?|n)\b|'\d\d(?:s\b|(?!\w))"  # rock'n'roll
    r"|\b(?:y'(?=all\b)|(?:ol|somethin)')"
    r"|[-+]\.?\d+(?:[.,:]\d+)*"
    rf"|\.?\d+(?:[.,:/]\d+)*{_LETTER}*(?:-{_LETTER}+|'[^\W\d]\w*)*"
    # An apostrophe joins after one letter (o'clock) and between vowels (ma'am); else it begins an ending ('s).
    rf"|(?:@|#(?=[a-z]))?{_LETTER}+(?:[-&/.@]{_LETTER}+|(?<=\b[a-hj-xz])'{_LETTER}{{2,}}|(?<=\w[aeiouy])'[aeiou]{_LETTER}*)*"
    r"(?:'(?:s|re|ve|ll|d|m|t)\b)*"
    r"|\S",
    re.IGNORECASE,
)
_CLITIC = re.compile(r"(n't|'(?:s|re|ve|ll|d|m))$")


@dataclass(frozen=True)
class CaptionScores:
    cider: np.ndarray
    """CIDEr of each row, (rows,) 0..10; the published number is their mean."""
    bleu: list[float]
    """BLEU-1 to BLEU-4 of all rows together, 0..1"""
    rouge: float
    """ROUGE-L, 0..1."""
    tokens: list[str]
    """Predictions after tokenisation, as they were compared."""


def words(caption: str) -> list[str]:
    """Cut a caption as Stanford's PTBTokenizer with `-lowerCase` does, without the punctuation coco-caption drops.

    As published: brackets become words of their own ("-lrb-"), and so do "!!" and "?!"; "½" is 1/2, a sign belongs
    to its number, and an accent written by itself is kept as it is. Rare abbreviations are cut otherwise than by the
    Java program.
    """
    text = caption.translate(_QUOTES).translate(_WRITTEN_OUT)
    tokens = []
    for token in _TOKEN.findall(text):
        tokens.extend(_pieces(_BRACKETS.get(token, token.lower())))
    return [token for token in tokens if token not in _DROPPED and token.strip("-")]


def _pieces(token: str) -> list[str]:
    if token in _SPLIT:
        return _SPLIT[token].split()
    tail = _CLITIC.search(token)
    if tail is None or tail.start() == 0:
        return [token]
    return [*_pieces(token[: tail.start()]), tail.group()]


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Score captions as coco-caption does: one prediction and its references a row.

    CIDEr weighs words by how rare they are in the references of this very file, so a part of a benchmark scores
    otherwise than the whole. Raises UserError where pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise UserError("captions: scoring needs pycocoevalcap; pip install 'ivl[eval]'") from error
    answers = {n: [" ".join(words(text))] for n, text in enumerate(predictions)}
    gold = {n: [" ".join(words(text)) for text in texts] for n, texts in enumerate(references)}
    _, cider = Cider().compute_score(gold, answers)
    bleu, _ = Bleu(4).compute_score(gold, answers, verbose=0)
    rouge, _ = Rouge().compute_score(gold, answers)
    return CaptionScores(
        cider, [float(value) for value in bleu], float(rouge), [texts[0] for texts in answers.values()]
    )
