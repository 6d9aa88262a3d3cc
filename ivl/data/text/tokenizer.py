"""Tokenizer: a checkpoint's tokenizer files → token ids, without remote code.

Two engines: `sentencepiece` reads `tokenizer.model` (InternLM2, Phi-3, Yi), `tokenizers` reads `vocab.json` with
`merges.txt` (Qwen) or `tokenizer.json` (Llama 3). Neither sees an added token: texts are cut at added tokens here, so
that a caller decides, text by text, which of them are recognised and which are plain characters.

Ids and `decode_as_reference` equal those of the slow tokenizer classes the released models were trained with
(transformers 4.37 and the releases' `tokenization_internlm2.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivl.architecture.config import read_json
from ivl.data.text.subword import CONTROL, Engine, SentencePieceEngine, json_engine, qwen2_engine
from ivl.types import UserError

IMAGE_TOKENS = frozenset(("<img>", "</img>", "<IMG_CONTEXT>"))
GROUNDING_TOKENS = frozenset(("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

Span = tuple["str | list[int]", Collection[str], bool]
"""Text (or ids as they are), the added tokens recognised in it, and True if it is trained on"""

Piece = tuple["str | list[int] | None", bool]


@dataclass(frozen=True)
class AddedToken:
    """Token that is matched in a text before anything else. `lstrip` / `rstrip`: it swallows blanks beside it."""

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    inside: bool = False
    """True for a token that the engine recognises inside a text (sentencepiece's user-defined symbols)"""
    special: bool = True
    """True for a control token; others, such as `<think>`, are a part of anybody's text"""


class Tokenizer:
    """Token ids of a text and back. Made by `Tokenizer.load`; picklable, so loader workers can have it."""

    def __init__(
        self,
        engine: Engine,
        added: Iterable[AddedToken],
        named: dict[str, str] | None = None,
        special: Iterable[str] = (),
        style: str = "",
        add_bos: bool = False,
        leading_space: bool = False,
    ) -> None:
        """`named`: bos_token, eos_token, … → text; `special`: tokens left out by `skip_special`; `style`: the class
        whose decoding `decode_as_reference` follows; `leading_space`: put a blank before a text."""
        self.engine = engine
        self.added = {token.text: token for token in added}
        known = {token.id for token in self.added.values()}
        for symbol, number in engine.symbols.items():
            if CONTROL.fullmatch(symbol) and symbol not in self.added and number not in known:
                self.added[symbol] = AddedToken(symbol, number, inside=True)
        self.special = frozenset(special)
        self.ordinary = frozenset(text for text, token in self.added.items() if not token.special)
        """Added tokens that are no control tokens: recognised whoever writes them"""
        self.style = style
        self.add_bos = add_bos
        self.leading_space = leading_space
        self._named = dict(named or {})
        self._text_of = {token.id: token.text for token in self.added.values()}
        self._strips = any(token.lstrip or token.rstrip for token in self.added.values())
        self._aliases = engine.literals(self._text_of) | {t.text: t.text for t in self.added.values() if t.inside}
        self._cutters: dict[frozenset[str], re.Pattern[str] | None] = {}
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder. Raises UserError where files or the image tokens are missing."""
        tokenizer = cls(**_read_files(Path(folder)))
        if "<IMG_CONTEXT>" not in tokenizer.added:
            raise UserError(
                f"{folder}: the tokenizer has no token <IMG_CONTEXT>; expected the tokenizer files of an InternVL "
                f"release, not those of its language model alone"
            )
        return tokenizer

    def __len__(self) -> int:
        """Largest id plus one."""
        return max(self.engine.size, 1 + max(self._text_of, default=-1))

    def token_id(self, text: str) -> int:
        """Id of an added token. Raises UserError where there is none of this text."""
        try:
            return self.added[text].id
        except KeyError:
            raise UserError(f"the tokenizer has no token {text!r}; is it the tokenizer of this checkpoint?") from None

    def _named_id(self, name: str) -> int | None:
        token = self.added.get(self._named.get(name, ""))
        return None if token is None else token.id

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int:
        """Padding id. Masks come from lengths, never from it, so any id will do."""
        for name in ("pad_token", "eos_token"):
            if (token := self._named_id(name)) is not None:
                return token
        return 0

    @property
    def context_id(self) -> int:
        """Id of one image position, `<IMG_CONTEXT>`."""
        return self.token_id("<IMG_CONTEXT>")

    def encode(self, text: str, special: bool = True, bos: bool = False) -> list[int]:
        """Ids of a text. `special` False: added tokens written in it are plain characters. `bos`: begin with it."""
        return self.encode_spans([(text, self.added if special else (), False)], bos)[0]

    def encode_spans(self, spans: Iterable[Span], bos: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of texts that follow one another, and a flag for each id: True if it is trained on.

        The text between two added tokens is tokenised in one piece, across spans. A token that reaches from one span
        into the next belongs to the span it begins in.
        """
        pieces: list[Piece] = []
        for content, names, trained in spans:
            if isinstance(content, str):
                pieces += [(piece, trained) for piece in self._cut(self.engine.normalize(content), frozenset(names))]
            elif content:
                pieces.append((content, trained))
        if self._strips:
            pieces = self._swallow_blanks(pieces)
        if self.leading_space and pieces:
            pieces = self._with_leading_space(pieces)
        ids: list[int] = []
        flags: list[bool] = []
        if bos and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
            flags.append(False)
        text: list[tuple[str, bool]] = []
        for piece, trained in [*pieces, (None, False)]:
            if isinstance(piece, str):
                text.append((piece, trained))
                continue
            if text:
                self._encode_text(text, ids, flags)
                text = []
            if piece:
                ids += piece
                flags += [trained] * len(piece)
        return ids, flags

    def _cut(self, text: str, names: frozenset[str]) -> list[str | list[int] | None]:
        """Text between the added tokens `names`, and their ids. None cuts a text where nothing else does: inside the
        vocabulary's own spelling of a token that is not recognised (InternLM2 reads `[UNUSED_TOKEN_145]` as
        `<|im_end|>`), so that it stays plain characters."""
        if names not in self._cutters:
            words = sorted({*names, *self._aliases}, key=len, reverse=True)
            self._cutters[names] = re.compile("(" + "|".join(map(re.escape, words)) + ")") if words else None
        cutter = self._cutters[names]
        if cutter is None:
            return [text] if text else []
        pieces: list[str | list[int] | None] = []
        for n, part in enumerate(cutter.split(text)):
            if n % 2 == 0:
                if part:
                    pieces.append(part)
            elif (token := self._aliases.get(part, part)) in names:
                pieces.append(part if self.added[token].inside else [self.added[token].id])
            else:
                pieces += [part[0], None, part[1:]]
        return pieces

    def _swallow_blanks(self, pieces: list[Piece]) -> list[Piece]:
        """Pieces without the blanks that `lstrip` and `rstrip` of added tokens take."""
        out = list(pieces)
        for n, (piece, _) in enumerate(pieces):
            if not isinstance(piece, list):
                continue
            before, after = (self.added.get(self._text_of.get(piece[end], "")) for end in (0, -1))
            for wanted, step, strip in (
                (after is not None and after.rstrip, 1, str.lstrip),
                (before is not None and before.lstrip, -1, str.rstrip),
            ):
                at = n + step
                while wanted and 0 <= at < len(out) and not isinstance(out[at][0], list):
                    text, trained = out[at]
                    out[at] = (strip(text) if isinstance(text, str) else text, trained)
                    if out[at][0]:
                        break
                    at += step
        return [(piece, trained) for piece, trained in out if piece != ""]

    def _with_leading_space(self, pieces: list[Piece]) -> list[Piece]:
        """Put a blank before the text, but none right before a special token, as `legacy=False` does."""
        first = pieces[0][0]
        if isinstance(first, list) and self._text_of.get(first[0]) in self.special:
            return pieces
        return [(" ", False), *pieces]

    def _encode_text(self, parts: list[tuple[str, bool]], ids: list[int], flags: list[bool]) -> None:
        new = self.engine.encode("".join(text for text, _ in parts))
        ids += new
        if len({trained for _, trained in parts}) == 1:
            flags += [parts[0][1]] * len(new)
            return
        ends, end = [], self.engine.prefix
        for text, trained in parts:
            end += len(text.encode())
            ends.append((end, trained))
        at, part = 0, 0
        for token in new:
            while at >= ends[part][0]:
                part += 1
            flags.append(ends[part][1])
            at += len(self.token_bytes(token))
        assert at == end, f"tokens of {at} bytes for a text of {end}"

    def token_bytes(self, token: int) -> bytes:
        """Bytes of a token. A character may be spread over several tokens, so a stream decodes these jointly.

        Empty for ids beyond the vocabulary (a model's embedding may have spare rows).
        """
        if token not in self._bytes:
            text = self._text_of.get(token)
            self._bytes[token] = text.encode() if text is not None else self.engine.token_bytes(token)
        return self._bytes[token]

    def decode(self, ids: Iterable[int], skip: Collection[int] = (), skip_special: bool = False) -> str:
        """Text of ids exactly as it was encoded: no blank is added or taken away.

        `skip`: ids to leave out; `skip_special`: leave out all special tokens, `<ref>` and `<box>` among them.
        """
        dropped = set(skip)
        if skip_special:
            dropped |= {self.added[text].id for text in self.special if text in self.added}
        joined = b"".join(self.token_bytes(int(token)) for token in ids if int(token) not in dropped)
        return joined.decode("utf-8", errors="replace")

    def decode_as_reference(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Text as the released tokenizer class decodes it: blanks around special tokens, none before punctuation.

        Use it only for answers that must equal published ones character by character; `decode` is the faithful one.
        """
        if not isinstance(self.engine, SentencePieceEngine):
            return self.decode(ids, skip_special=skip_special)
        named = set(self._named.values())
        skipped = {t.id for t in self.added.values() if skip_special and t.text in self.special}
        apart = {
            t.id
            for t in self.added.values()
            if not t.inside and (t.text not in self.special or (t.text not in named and t.id >= self.engine.size))
        }
        parts: list[str] = []
        run: list[int] = []
        for token in [*(i for i in map(int, ids) if i not in skipped), None]:
            if token is not None and token not in apart:
                run.append(token)
                continue
            text = self._reference_run(self.engine, run) if run else ""
            if text or (run and token is None):
                parts.append(text)
            run = []
            if token is not None:
                parts.append(self._text_of[token])
        return " ".join(parts)

    def _reference_run(self, engine: SentencePieceEngine, ids: list[int]) -> str:
        """Text of tokens between two added ones. The engine's `join` drops the blank of a dummy prefix."""
        llama = self.style == "llama"
        pieces = [self._text_of[i] if self._text_of.get(i) in self.special else engine.pieces([i])[0] for i in ids]
        if llama and pieces[0].startswith("▁"):
            pieces[0] = pieces[0][1:]
        out, words, after_special = "", [], False
        for n, piece in enumerate(pieces):
            if piece not in self.special:
                words.append(piece)
                after_special = False
                continue
            blank = not after_special and (not llama or (n > 0 and not self.leading_space))
            out += " " * blank + engine.join(words) + piece
            words, after_special = [], True
        out += engine.join(words)
        if not llama:
            for mark in (".", "?", "!", ","):
                out = out.replace(" " + mark, mark)
            out = out.replace(" ' ", "'")
            for ending in ("n't", "'m", "'s", "'ve", "'re"):
                out = out.replace(" " + ending, ending)
        return out


def _read_files(folder: Path) -> dict[str, Any]:
    """Arguments of Tokenizer from the files of a checkpoint folder."""
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    kind = str(settings.get("tokenizer_class", "")).removesuffix("Fast")
    named, special = _special_tokens(folder, settings)
    tokens: list[dict[str, Any]] = []
    add_bos, leading_space, style = bool(settings.get("add_bos_token", False)), False, ""
    if (folder / "tokenizer.model").is_file():
        leading_space = kind == "LlamaTokenizer" and settings.get("legacy") is False
        style = "llama" if kind == "LlamaTokenizer" else "internlm2"
        path = folder / "tokenizer.model"
        pieces = SentencePieceEngine(path.read_bytes(), str(path), dummy_prefix=not leading_space)
        engine: Engine = pieces
        add_bos = bool(settings.get("add_bos_token", True))
        named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | named
        control = {pieces.sp.id_to_piece(i): i for i in (pieces.sp.unk_id(), pieces.sp.bos_id(), pieces.sp.eos_id())}
        tokens = [{"content": text, "id": i, "special": True} for text, i in control.items() if i >= 0]
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and kind == "Qwen2Tokenizer":
        engine = qwen2_engine(folder)
    elif (folder / "tokenizer.json").is_file():
        engine, tokens, add_bos, leading_space = json_engine(folder / "tokenizer.json")
        special = special | {token["content"] for token in tokens if token.get("special")}
    else:
        raise UserError(
            f"{folder}: no tokenizer; expected tokenizer.model, or vocab.json with merges.txt (Qwen2Tokenizer), or "
            f"tokenizer.json"
        )
    if (folder / "added_tokens.json").is_file():
        tokens += [{"content": t, "id": i} for t, i in read_json(folder / "added_tokens.json").items()]
    tokens += [token | {"id": int(i)} for i, token in settings.get("added_tokens_decoder", {}).items()]
    special |= set(named.values())
    control_tokens = special | {t["content"] for t in tokens if t.get("special")}
    added = {
        text: AddedToken(text, t["id"], bool(t.get("lstrip")), bool(t.get("rstrip")), special=text in control_tokens)
        for t in tokens
        for text in (t["content"],)
    }
    return {
        "engine": engine,
        "added": added.values(),
        "named": named,
        "special": special,
        "style": style,
        "add_bos": add_bos,
        "leading_space": leading_space,
    }


def _special_tokens(folder: Path, settings: dict[str, Any]) -> tuple[dict[str, str], set[str]]:
    """Named tokens (bos_token, eos_token, … → text), and the texts of all other special tokens of the files."""
    path = folder / "special_tokens_map.json"
    values = settings | (read_json(path) if path.is_file() else {})

    def text(token: Any) -> str:
        return token["content"] if isinstance(token, dict) else str(token)

    named = {name: text(values[name]) for name in NAMED if values.get(name) is not None}
    others = values.get("additional_special_tokens") or values.get("extra_special_tokens") or []
    return named, {
        text(token) for token in (others.values() if isinstance(others, dict) and "content" not in others else others)
    }
