"""Words as the Java tokenizer cuts them, and coco-caption's numbers."""

import json
import shutil
from random import Random

import pytest

from ivl.eval.captions import caption_scores, words

NOUNS = (
    "man", "dog", "T-shirt", "women's race", "hot dog", "kids' toys", "3-year-old", "Mr. Smith", "U.S. flag",
    "rock'n'roll band", "½ cup", "cafe\u0301", "-3 degrees", "ma'am",
)  # fmt: skip
VERBS = ("is riding", "isn't holding", "can't see", "walks with", "they're on", "won't leave", "sits by", "cannot find")
ENDS = (".", "", "!", " .", "...", ", and smiles.", " (at night).", ' near a "STOP" sign.', " - outside", " at 5 p.m.")


def captions(count: int, seed: int) -> list[str]:
    rng = Random(seed)

    def pick(items):
        return items[int(rng.random() * len(items))]

    return [f"A {pick(NOUNS)} {pick(VERBS)} the {pick(NOUNS)}{pick(ENDS)}" for _ in range(count)]


@pytest.mark.parametrize(
    ("caption", "cut"),
    [
        ("A man's dog isn't here.", "a man 's dog is n't here"),
        ("A T-shirt, 3-year-old; two dogs' bones", "a t-shirt 3-year-old two dogs bones"),
        ("“Hello” – it’s 10:30 a.m.!", "hello it 's 10:30 a.m."),
        ("A dog (brown) cannot run...", "a dog -lrb- brown -rrb- can not run"),
        ("What?! $5, 50% & 1,000", "what ?! $ 5 50 % & 1,000"),
        ("Mr. Smith etc. in the U.S.", "mr. smith etc. in the u.s."),
        ("'Tis what they're gonna see", "'t is what they 're gon na see"),
        ("rock'n'roll, rock 'n' roll and fish'n chips", "rock 'n' roll rock 'n' roll and fish 'n chips"),
        ("½ of 1½ cups, 2½-inch", "1/2 of 1 1/2 cups 2 1/2 inch"),
        ("-3 degrees, +4 (-7) or 10%-20% --5 a-b", "-3 degrees +4 -lrb- -7 -rrb- or 10 % -20 % 5 a-b"),
        ("a cafe\u0301 and a café", "a cafe\u0301 and a café"),
        (
            "o'clock ma'am Qur'an y'all c'mon 6'2\" 5'10 women's-only",
            "o'clock ma'am qur an y' all c'mon 6 2 5 '10 women 's only",
        ),
        ("'em 'cause couldn't've 1980's Jan. #tag", "'em 'cause could n't 've 1980 's jan. #tag"),
        ("", ""),
    ],
)
def test_words(caption, cut):
    assert words(caption) == cut.split()


def test_scores_by_hand():
    pytest.importorskip("pycocoevalcap")
    gold = ["a cat sits", "a dog runs", "two birds fly high"]
    found = caption_scores(gold, [[text] for text in gold])
    assert found.bleu == pytest.approx([1, 1, 1, 1])
    assert found.rouge == pytest.approx(1)
    assert found.cider[2] == pytest.approx(10)
    assert caption_scores(["x", "y", "z"], [[text] for text in gold]).cider.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_equal_to_coco_caption_with_java(tmp_path):
    """600 pictures with 3 references each, through pycocoevalcap from text to score."""
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("java is not installed")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    said, gold = captions(600, 0), captions(1800, 1)
    gold = [gold[n : n + 3] for n in range(0, 1800, 3)]
    said = [rows[0] if n % 4 == 0 else text for n, (text, rows) in enumerate(zip(said, gold))]
    tokenizer = PTBTokenizer()
    cut = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(said)})
    cut_gold = tokenizer.tokenize({n: [{"caption": t} for t in texts] for n, texts in enumerate(gold)})
    ours = caption_scores(said, gold)
    assert ours.tokens == [cut[n][0] for n in range(600)]
    assert ours.cider.tolist() == Cider().compute_score(cut_gold, cut)[1].tolist()
    assert ours.bleu == Bleu(4).compute_score(cut_gold, cut, verbose=0)[0]
    assert ours.rouge == Rouge().compute_score(cut_gold, cut)[0]
    assert json.loads(json.dumps(ours.bleu)) == ours.bleu
