"""Our tokenizer in the form of the `tokenizers` library, for folders in transformers' own layout.

Not every release can be said there: a caller compares ids. Blanks before a text are put per stretch between added
tokens, as the slow classes do.
"""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from ivl.data.engines import SentencePieceEngine
from ivl.data.tokenizer import Tokenizer
from ivl.types import UserError


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same vocabulary, added tokens and ids. Raises UserError where the library cannot say them."""
    engine = tokenizer.engine
    if tokenizer.leading_space:
        raise UserError("a blank before the first word of a text only (legacy=False) has no exact form")
    if isinstance(engine, SentencePieceEngine):
        fast = _of_pieces(engine, {t.id: t.text for t in tokenizer.added.values()})
    else:
        fast = tokenizers.Tokenizer.from_str(engine.tokenizer.to_str())
        if engine.nfc:
            fast.normalizer = normalizers.NFC()
        if engine.byte_level:
            fast.decoder = decoders.ByteLevel()
    raw = json.loads(fast.to_str())
    raw["added_tokens"] = [_added(token, tokenizer) for token in sorted(tokenizer.added.values(), key=lambda t: t.id)]
    fast = tokenizers.Tokenizer.from_str(json.dumps(raw))
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        bos = tokenizer.token_bytes(tokenizer.bos_id).decode()
        around = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B", "special_tokens": [(bos, tokenizer.bos_id)]}
        fast.post_processor = processors.TemplateProcessing(**around)
    odd = [t.text for t in tokenizer.added.values() if fast.token_to_id(t.text) != t.id]
    if odd:
        raise UserError(f"the tokenizers library gives other ids to {', '.join(odd[:5])}")
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


def _of_pieces(engine: SentencePieceEngine, names: dict[int, str]) -> tokenizers.Tokenizer:
    """A sentencepiece model of pairs; `names`: ids whose piece is spelled otherwise."""
    sp = engine.sp
    pieces = [names.get(n, sp.id_to_piece(n)) for n in range(engine.size)]
    scores = {piece: sp.get_score(n) for n, piece in enumerate(pieces)}
    ids = {piece: n for n, piece in enumerate(pieces)}
    plain = [n for n in range(engine.size) if not (sp.is_control(n) or sp.is_unknown(n) or sp.is_byte(n) or n in names)]
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
    )
    fast = tokenizers.Tokenizer(bpe)
    blank = [normalizers.Prepend("▁")] if engine.prefix else []
    fast.normalizer = normalizers.Sequence([*blank, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if engine.prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return fast
