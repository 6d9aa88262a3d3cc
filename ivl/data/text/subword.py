"""Sub-word engines of the tokenizer (sentencepiece, `tokenizers`), read from a checkpoint.

An engine knows a vocabulary and nothing of added tokens. The bytes of its tokens add up to the bytes of the text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, models, pre_tokenizers

from ivl.architecture.config import read_json
from ivl.types import UserError

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenizer pattern of Qwen2 and Qwen3, which their `vocab.json` and `merges.txt` do not contain"""


CONTROL = re.compile(r"<[^<>\s]+>|\[[A-Z0-9_]+\]")
"""Spelling of a control token: `<|im_start|>`, `[UNUSED_TOKEN_7]`"""


class SentencePieceEngine:
    """`tokenizer.model`: byte-pair encoding over characters, with bytes for what the vocabulary lacks.

    `size`: ids below it are the engine's. `prefix`: bytes that `encode` puts before a text. `symbols`: pieces that are
    recognised before anything else (user-defined symbols), wherever they stand in a text, and their ids.
    """

    def __init__(self, model: bytes, where: str = "tokenizer.model", dummy_prefix: bool = True) -> None:
        """`dummy_prefix` False: no blank is put before a text, whatever the model says (`legacy=False`)."""
        proto = sentencepiece_model_pb2.ModelProto()
        try:
            proto.ParseFromString(model)
        except Exception as error:  # protobuf's DecodeError has no stable home
            raise UserError(f"{where}: not a sentencepiece model ({error}); is the download complete?") from error
        rules = proto.normalizer_spec
        if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
            raise UserError(f"{where}: it rewrites texts ({rules.name}); expected a model that leaves them as they are")
        self.guarded = not dummy_prefix
        if not dummy_prefix:
            rules.add_dummy_prefix = False
        sentencepiece.set_min_log_level(2)
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        sentencepiece.set_min_log_level(0)
        self.prefix = int(rules.add_dummy_prefix)
        self.size = len(self.sp)
        self._guard = len(self.sp.encode("<unk>")) if self.guarded else 0
        user_defined = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        self.symbols = {piece.piece: n for n, piece in enumerate(proto.pieces) if piece.type == user_defined}

    @staticmethod
    def normalize(text: str) -> str:
        """Replace the vocabulary's blank (`▁`) by a blank."""
        return text.replace("▁", " ")

    def encode(self, text: str) -> list[int]:
        if self.guarded and text.startswith(" "):
            # as LlamaTokenizer with legacy=False does it, so that sentencepiece sees the blank inside a text
            return self.sp.encode("<unk>" + text)[self._guard :]
        return self.sp.encode(text)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.size or self.sp.is_control(token):
            return b""
        piece = self.sp.id_to_piece(token)
        return bytes([int(piece[1:-1], 16)]) if self.sp.is_byte(token) else piece.replace("▁", " ").encode()

    def literals(self, ids: dict[int, str]) -> dict[str, str]:
        """Map the vocabulary's spelling of each of `ids` to its text in `ids`; control and unknown pieces left out."""
        readable = [i for i in ids if 0 <= i < self.size and not self.sp.is_control(i) and not self.sp.is_unknown(i)]
        return {self.sp.id_to_piece(i): ids[i] for i in readable}

    def pieces(self, ids: list[int]) -> list[str]:
        return [self.sp.id_to_piece(i) for i in ids]

    def join(self, pieces: list[str]) -> str:
        return self.sp.decode_pieces(pieces)


class TokenizersEngine:
    """A byte-pair model of the `tokenizers` library, over bytes (Qwen, Llama 3) or over characters (converted ones)."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, nfc: bool = False, byte_level: bool = True) -> None:
        """`tokenizer` has no added tokens, adds none around a text, and leaves it as it is but for `nfc`."""
        self.tokenizer = tokenizer
        self.nfc = nfc
        self.byte_level = byte_level
        self.size = tokenizer.get_vocab_size()
        self._byte_of = {char: byte for byte, char in _byte_characters().items()}
        # User-defined symbols as `ivl.data.text.fast_tokenizer` writes them: in the vocabulary, and not cut by a Split
        self.symbols: dict[str, int] = {}
        if not byte_level and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.Sequence | pre_tokenizers.Split):
            vocabulary = {t: n for t, n in tokenizer.get_vocab().items() if CONTROL.fullmatch(t)}
            self.symbols = {text: n for text, n in vocabulary.items() if self.encode(f"a{text}a")[1:-1] == [n]}
        self.prefix = sum(len(self.token_bytes(token)) for token in self.encode("a")) - 1

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def token_bytes(self, token: int) -> bytes:
        piece = self.tokenizer.id_to_token(token) if token >= 0 else None
        if piece is None:
            return b""
        if self.byte_level:
            known = all(char in self._byte_of for char in piece)
            return bytes(self._byte_of[char] for char in piece) if known else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def literals(self, ids: dict[int, str]) -> dict[str, str]:
        return {}


Engine = SentencePieceEngine | TokenizersEngine


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}


def qwen2_engine(folder: Path) -> TokenizersEngine:
    """Engine of `vocab.json` and `merges.txt`."""
    vocab = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges: list[Any] = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}/merges.txt: does not fit vocab.json ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return TokenizersEngine(tokenizer, nfc=True)


def json_engine(path: Path) -> tuple[TokenizersEngine, list[dict[str, Any]], bool, bool]:
    """Read a `tokenizer.json`: engine, added tokens, True if a text begins with bos, True if with a blank."""
    raw = read_json(path)
    added = raw.get("added_tokens") or []
    first = '"prepend_scheme": "first"' in json.dumps(raw.get("pre_tokenizer"))
    if first:  # the blank is put by the caller, who sees the whole text
        raw |= {"pre_tokenizer": json.loads(json.dumps(raw["pre_tokenizer"]).replace('"first"', '"never"'))}
    normalizer = raw.get("normalizer")
    nfc = isinstance(normalizer, dict) and normalizer.get("type") == "NFC"
    bos = bool(_bos_of(raw.get("post_processor")))
    bare = raw | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    if nfc:
        bare["normalizer"] = None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bare))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer file ({error})") from error
    byte_level = "ByteLevel" in json.dumps(raw.get("pre_tokenizer"))
    return TokenizersEngine(tokenizer, nfc, byte_level), added, bos, first


def _bos_of(post_processor: Any) -> str | None:
    """Token that a template processor puts before a single text; None where it puts none."""
    if not isinstance(post_processor, dict):
        return None
    if post_processor.get("type") == "Sequence":
        return next(filter(None, map(_bos_of, post_processor.get("processors", []))), None)
    first = (post_processor.get("single") or [{}])[0]
    return first.get("SpecialToken", {}).get("id")
