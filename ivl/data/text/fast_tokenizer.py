"""`tokenizers` form of our tokenizer, for folders in transformers' layout.

Blanks before a text are put per stretch between added tokens, as the slow classes do; or before its first word only
(`legacy=False`), where a text that begins with a blank of its own gets none: the library cannot say that one.
"""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from ivl.data.text.subword import SentencePieceEngine
from ivl.data.text.tokenizer import Tokenizer
from ivl.types import UserError


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Convert: same vocabulary, added tokens and ids. Raises UserError where the library gives other ids."""
    engine = tokenizer.engine
    added = sorted((token for token in tokenizer.added.values() if not token.inside), key=lambda token: token.id)
    if isinstance(engine, SentencePieceEngine):
        fast = _of_pieces(engine, {t.id: t.text for t in added}, tokenizer.leading_space)
    else:
        fast = tokenizers.Tokenizer.from_str(engine.tokenizer.to_str())
        if engine.nfc:
            fast.normalizer = normalizers.NFC()
        if engine.byte_level:
            fast.decoder = decoders.ByteLevel()
    raw = json.loads(fast.to_str())
    if tokenizer.leading_space:  # `json_engine` leaves the blank to its caller
        raw["pre_tokenizer"] = json.loads(json.dumps(raw["pre_tokenizer"]).replace('"never"', '"first"'))
    raw["added_tokens"] = [_added(token, tokenizer) for token in added]
    fast = tokenizers.Tokenizer.from_str(json.dumps(raw))
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        bos = tokenizer.token_bytes(tokenizer.bos_id).decode()
        around = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, tokenizer.bos_id)]}
        fast.post_processor = processors.TemplateProcessing(**around)
    mismatches = [t.text for t in added if fast.token_to_id(t.text) != t.id]
    if mismatches:
        raise UserError(f"the tokenizers library gives other ids to {', '.join(mismatches[:5])}")
    return fast


def _added(token: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "id": token.id,
        "content": token.text,
        "single_word": False,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": False,
        "special": token.text in tokenizer.special,
    }


def _of_pieces(engine: SentencePieceEngine, names: dict[int, str], leading_space: bool) -> tokenizers.Tokenizer:
    """A sentencepiece model of pairs; `names`: ids whose piece is spelled otherwise; `leading_space`: a blank before
    the first word of a text."""
    sp = engine.sp
    pieces = [names.get(n, sp.id_to_piece(n)) for n in range(engine.size)]
    scores = {piece: sp.get_score(n) for n, piece in enumerate(pieces)}
    ids = {piece: n for n, piece in enumerate(pieces)}
    symbols = {piece: n for piece, n in engine.symbols.items() if n not in names}
    apart = {*names, *symbols.values()}
    plain = [n for n in range(engine.size) if not (sp.is_control(n) or sp.is_unknown(n) or sp.is_byte(n) or n in apart)]
    merges = [
        (-scores[piece], n, ids[piece[:at]], piece[:at], piece[at:])
        for n, piece in ((n, pieces[n]) for n in plain)
        for at in range(1, len(piece))
        if piece[:at] in ids and piece[at:] in ids
    ]
    bpe = models.BPE(
        ids,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=pieces[sp.unk_id()],
        fuse_unk=True,
        byte_fallback=True,
        ignore_merges=bool(symbols),
    )
    fast = tokenizers.Tokenizer(bpe)
    blank = [normalizers.Prepend("▁")] if engine.prefix else []
    fast.normalizer = normalizers.Sequence([*blank, normalizers.Replace(" ", "▁")])
    cuts: list[pre_tokenizers.PreTokenizer] = []
    if leading_space:
        cuts.append(pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False))
    if symbols:  # recognised before anything else, and no pair reaches over them
        words = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        cuts.append(pre_tokenizers.Split(Regex(words), "isolated"))
    if cuts:
        fast.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    strip = [decoders.Strip(" ", 1, 0)] if engine.prefix or leading_space else []
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return fast
