"""Token ids and texts equal those recorded from the reference's slow tokenizers."""

import json
import pickle
import time

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ivl.data.text.tokenizer import GROUNDING_TOKENS, Tokenizer
from ivl.types import UserError
from tests.tiny import _byte_level_bpe, write_tokenizer

CHECKPOINTS = (
    "internvl2_1b", "internvl2_2b", "internvl2_4b", "internvl2_26b", "internvl_chat_v1_5", "internvl3_8b",
    "internvl3_5_4b",
)  # fmt: skip


@pytest.fixture(scope="module", params=CHECKPOINTS)
def recorded(request, golden):
    tokenizer = Tokenizer.load(golden / "checkpoints" / request.param)
    return tokenizer, json.loads((golden / "refs" / request.param / "tokenizer.json").read_text())


def test_recorded_strings(recorded):
    tokenizer, recording = recorded
    assert len(recording["strings"]) >= 39
    for case in recording["strings"]:
        text = case["text"]
        assert tokenizer.encode(text, bos=True) == case["ids"], text
        assert tokenizer.encode(text) == case["ids_no_special"], text
        assert tokenizer.decode_as_reference(case["ids"]) == case["decode"], text
        assert tokenizer.decode_as_reference(case["ids"], skip_special=True) == case["decode_skip_special"], text


def test_recorded_attributes(recorded):
    tokenizer, recording = recorded
    assert len(tokenizer) == recording["length"]
    assert tokenizer.engine.size == recording["vocab_size"]
    assert (tokenizer.bos_id, tokenizer.eos_id) == (recording["bos_token_id"], recording["eos_token_id"])
    assert tokenizer.pad_id == recording["pad_token_id"]
    for text, token in recording["added_token_ids"].items():
        assert tokenizer.token_id(text) == token


def test_recorded_internlm2(golden):
    recording = json.loads((golden / "tokenizer_internlm2.json").read_text())
    start = time.perf_counter()
    tokenizer = Tokenizer.load(golden / recording["checkpoint_with_same_tokenizer"])
    assert time.perf_counter() - start < 1
    for case in recording["strings"]:
        text = case["text"]
        assert tokenizer.encode(text, bos=True) == case["ids"], text
        assert tokenizer.encode(text) == case["ids_no_bos"], text
        for ids, suffix in (("ids", ""), ("ids_no_bos", "_no_bos")):
            assert tokenizer.decode_as_reference(case[ids]) == case["decode" + suffix], text
            skipped = tokenizer.decode_as_reference(case[ids], skip_special=True)
            assert skipped == case[f"decode{suffix}_skip_special"], text
        # without added tokens the engine is the bare model: the same characters give the ids of plain text
        if "UNUSED" not in text and not any(t in text for t in ("<s>", "</s>", "<unk>")):
            assert tokenizer.encode(text, special=False) == case["ids_bare_model"][1:], text
    for case in recording["random_decodes"]:
        assert tokenizer.decode_as_reference(case["ids"]) == case["decode"]
        assert tokenizer.decode_as_reference(case["ids"], skip_special=True) == case["decode_skip_special"]


def test_decode_is_the_encoded_text(recorded):
    tokenizer, recording = recorded
    for case in recording["strings"]:
        text = case["text"].replace("▁", " ")
        for special in (True, False):
            again = tokenizer.decode(tokenizer.encode(text, special=special))
            if tokenizer.leading_space:
                again = again.removeprefix(" ")
                if special and any(t.rstrip and t.text in text for t in tokenizer.added.values()):
                    continue  # such a token swallows the blanks after it
            if "UNUSED" not in text and "\u0301" not in text:  # read as the token it names; composed by NFC
                assert again == text


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["<IMG_CONTEXT>", "<img>", "</s>", "<s>", "<|im_end|>", "<|end|>", "<ref>", "[UNUSED_TOKEN_145]"]
        )
        | st.text(st.characters(codec="utf-8"), max_size=8)
    )
)
def test_plain_text_holds_no_control_token(every, parts):
    text = "".join(parts)
    for tokenizer in every:
        control = {token.id for token in tokenizer.added.values()}
        ids = tokenizer.encode(text, special=False)
        assert not control & set(ids)
        some = tokenizer.encode_spans([(text, GROUNDING_TOKENS, False)])[0]
        grounding = {tokenizer.token_id(token) for token in GROUNDING_TOKENS}
        assert not (control - grounding) & set(some)
        assert some.count(tokenizer.token_id("<ref>")) == text.count("<ref>")


@pytest.fixture(scope="module")
def every(golden):
    return [Tokenizer.load(golden / "checkpoints" / name) for name in CHECKPOINTS if name != "internvl2_26b"]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=20), st.text(st.characters(codec="utf-8"), max_size=20))
@example("a▁", "▁b▁")
@example("e", "\u0301")
def test_spans_are_tokenised_as_one_text(every, left, right):
    for tokenizer in every:
        spans = [("<img>", tokenizer.added, False), (left, (), False), (right, (), True)]
        ids, trained = tokenizer.encode_spans(spans)
        one = "".join(map(tokenizer.engine.normalize, (left, right)))
        assert ids[1 + (ids[0] != tokenizer.token_id("<img>")) :] == (tokenizer.engine.encode(one) if one else [])
        # untrained tokens come first; they cover the left text, and no more than one of them reaches beyond it
        assert trained == sorted(trained)
        covered = b"".join(tokenizer.token_bytes(i) for i in ids[: trained.count(False)])
        before = b"".join(tokenizer.token_bytes(i) for i in ids[: trained.count(False) - 1])
        whole = ("<img>" + tokenizer.engine.normalize(left)).encode()
        covered, before = covered.lstrip(b" "), before.lstrip(b" ")  # the blank some put before everything
        assert len(before) < len(whole) <= len(covered)


def test_picklable(recorded):
    tokenizer, recording = recorded
    again = pickle.loads(pickle.dumps(tokenizer))
    case = recording["strings"][13]
    assert again.encode(case["text"], bos=True) == case["ids"]
    assert again.decode(case["ids"]) == tokenizer.decode(case["ids"])


def test_missing_files(tmp_path, golden):
    with pytest.raises(UserError, match=r"no tokenizer; expected tokenizer\.model"):
        Tokenizer.load(tmp_path)
    source = golden / "checkpoints" / "internvl2_2b" / "tokenizer.model"
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
    with pytest.raises(UserError, match="no token <IMG_CONTEXT>"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(source.read_bytes()[:1000])
    with pytest.raises(UserError, match="is the download complete"):
        Tokenizer.load(tmp_path)


# Shapes of files without a recording


mixed = st.lists(
    st.sampled_from(["<img>", "<ref>", "<|im_end|>", "</s>", " ", "\n", "Describe", "digit 12"])
    | st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=8)
).map("".join)


@pytest.mark.parametrize("style", ["llama3", "qwen2"])
def test_as_the_tokenizers_library_reads_the_whole_file(tmp_path, style):
    """tokenizer.json alone (Llama 3), and vocab.json with merges.txt (Qwen), against one `tokenizers.Tokenizer`."""
    write_tokenizer(tmp_path, style)
    reference = tokenizers.Tokenizer.from_str(_byte_level_bpe())
    ours = Tokenizer.load(tmp_path)
    begin = False
    if style == "llama3":
        raw = json.loads((tmp_path / "tokenizer.json").read_text())
        bos = raw["added_tokens"][0]
        raw["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos["content"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos["content"]: {"id": bos["content"], "ids": [bos["id"]], "tokens": [bos["content"]]}},
        }
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        ours, begin = Tokenizer.load(tmp_path), True
        reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    else:
        reference.add_special_tokens(sorted(ours.added, key=lambda text: ours.added[text].id))

    @settings(max_examples=150, deadline=None)
    @given(mixed)
    def check(text):
        ids = ours.encode(text, bos=begin)
        assert ids == reference.encode(text).ids
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids, skip_special=True) == reference.decode(ids, skip_special_tokens=True)
        plain = ours.encode(text, special=False)
        assert not {token.id for token in ours.added.values()} & set(plain)

    check()
    assert len(ours) == reference.get_vocab_size()


def test_each_piece_of_a_legacy_tokenizer_begins_with_a_blank(tmp_path):
    """Yi: sentencepiece puts a blank before every text between two added tokens; labels still fall where they must."""
    write_tokenizer(tmp_path, "yi")
    ours = Tokenizer.load(tmp_path)
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    text = "Describe<img>the cat</img> 7"
    expected = [*model.encode("Describe"), ours.token_id("<img>"), *model.encode("the cat")]
    assert ours.encode(text, bos=True) == [*expected, ours.token_id("</img>"), *model.encode(" 7")]
    ids, trained = ours.encode_spans([("<img>cate", ours.added, False), ("gory: 12", (), True)])
    learnt = ours.decode([i for i, flag in zip(ids, trained) if flag])
    assert "category: 12".endswith(learnt)
    assert len(learnt) <= len("gory: 12")
    assert ours.decode(ids) == "<img> category: 12"


def test_files_that_do_not_fit(tmp_path):
    write_tokenizer(tmp_path, "qwen2")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nno such\n")
    with pytest.raises(UserError, match=r"merges\.txt: does not fit vocab\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "json").mkdir()
    write_tokenizer(tmp_path / "json", "llama3")
    path = tmp_path / "json" / "tokenizer.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"model": {"type": "?"}}))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer file"):
        Tokenizer.load(tmp_path / "json")
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Tokenizer.load(tmp_path / "json")


def test_ids_and_names(every):
    for tokenizer in every:
        assert tokenizer.context_id == tokenizer.token_id("<IMG_CONTEXT>")
        assert tokenizer.token_bytes(10**6) == tokenizer.token_bytes(len(tokenizer)) == b""
        with pytest.raises(UserError, match=r"no token '<\|nobody\|>'"):
            tokenizer.token_id("<|nobody|>")
        ids = tokenizer.encode("<img>a<ref>b")
        assert tokenizer.decode(ids, skip=[tokenizer.token_id("<img>")]).strip() == "a<ref>b"
        special = "<img>" in tokenizer.special  # in the releases of 3 and 3.5 they are not
        assert tokenizer.decode(ids, skip_special=True).strip() == ("ab" if special else "<img>a<ref>b")


@pytest.mark.parametrize("style", ["yi-symbols", "yi-prefix"])
def test_symbols_of_the_vocabulary_are_control_tokens_where_they_may_be(tmp_path, style):
    """Yi's `<|im_start|>` is a user-defined symbol of sentencepiece, which recognises it wherever it stands."""
    write_tokenizer(tmp_path, style)
    tokenizer = Tokenizer.load(tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in ("<|im_start|>user\nhi", " a<fim_prefix>b", "The Ｅ [UNUSED_TOKEN_3]"):
        assert tokenizer.encode(text) == sp.encode(text)
    for symbol in ("<|im_start|>", "<fim_prefix>", "[UNUSED_TOKEN_3]"):
        assert tokenizer.token_id(symbol) == sp.piece_to_id(symbol)
        for text in (symbol, f"read {symbol} and {symbol}{symbol}"):
            ids = tokenizer.encode(text, special=False)
            assert sp.piece_to_id(symbol) not in ids
            assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert sp.piece_to_id("Ｅ") in tokenizer.encode("Ｅ", special=False)  # a letter


TRIALS = (
    "Describe the image. How many sheep are there? 4, or 12?",
    "<|im_start|>system\nYou are<|im_end|><|im_start|>user\n hi <ref>cat</ref> <fim_prefix>x [UNUSED_TOKEN_3] ＥＥ",
    "请描述这张图片。 Größe  naïve 🐑\n\n",
    "<|user|>\n a <|end|>  b<|assistant|>",
    "<s> a</s> b",
)


@pytest.mark.parametrize("style", ["yi", "yi-symbols", "yi-prefix", "phi3", "internlm2"])
def test_the_tokenizers_library_gives_the_ids_of_sentencepiece(tmp_path, style):
    from ivl.data.text.fast_tokenizer import fast_tokenizer

    write_tokenizer(tmp_path, style)
    tokenizer = Tokenizer.load(tmp_path)
    fast = fast_tokenizer(tokenizer)
    for text in TRIALS:
        assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text
    (tmp_path / "json").mkdir()
    fast.save(str(tmp_path / "json/tokenizer.json"))
    again = Tokenizer.load(tmp_path / "json")
    for text in (*TRIALS, " a", "  a"):
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.encode(text, special=False) == tokenizer.encode(text, special=False), text
