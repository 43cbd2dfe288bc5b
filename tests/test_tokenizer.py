"""Both kinds of tokenizers: no text is lost, spans keep their borders, and what loses text is refused."""

import gzip
import io
import itertools
import json
import re
import string
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from documents import check_round_trip, random_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from rmft_jax.config import TokenizerConfig
from rmft_jax.data import word_cache
from rmft_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from rmft_jax.data.pieces import longest_pieces, pieces_with
from rmft_jax.data.prepare import _text_outside_pii
from rmft_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from rmft_jax.data.synthetic import synthetic_mail
from rmft_jax.data.tokenizer import load_tokenizer
from rmft_jax.errors import UserError
from rmft_jax.pii.detector import detect

ENRON = Path(__file__).parents[2] / "shared" / "data" / "enron_train.jsonl.gz"
END = "<|endoftext|>"


def byte_level(texts, *, size=500, special=(END,), **parts):
    """Train a byte-level BPE as GPT-2's is, with other parts if they are given."""
    out = tokenizers.Tokenizer(models.BPE())
    out.pre_tokenizer = parts.get("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False))
    out.decoder = decoders.ByteLevel()
    if "normalizer" in parts:
        out.normalizer = parts["normalizer"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": list(special), "initial_alphabet": alphabet, "show_progress": False}
    out.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    return out


@pytest.fixture(scope="module", params=["bpe", "unigram", "tokenizer.json"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, tmp_path_factory):
    """Return a small tokenizer of each kind, loaded from its file."""
    folder, texts = tmp_path_factory.mktemp("tokenizer"), random_texts(300, seed=3)
    texts += [string.digits + string.punctuation] * 30
    if kind == "tokenizer.json":
        byte_level(texts).save(str(folder / "tokenizer.json"))
    else:
        config = TokenizerConfig(vocab_size=450 if kind == "bpe" else 380, model_type=kind)
        SentencePieceTokenizer.train(texts, config).save(folder)
    return load_tokenizer(folder)


ADDRESSES = st.sampled_from(["jane.doe@mail.com", "X_1@a-b.co.uk", "<bob@site.org>,amy@site.org", "o'neil@x.net;"])
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SPACE = "\u2581"  # SentencePiece's own sign for one
ODD = st.sampled_from([" ", "\n\n", END, "</s>", "<0x41>", SPACE, f"{SPACE} ", f"a{SPACE}{SPACE}b"])
DOCUMENTS = st.lists(st.one_of(ADDRESSES, ANYTHING, ODD), max_size=8)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(pieces=DOCUMENTS)
def test_text_and_spans_come_back_whatever_the_text(tokenizer, pieces):
    text = "".join(pieces)
    check_round_trip([text], tokenizer)
    (ids,) = tokenizer.encode([text])
    assert sum(np.array(tokenizer.byte_lengths(), int)[ids]) == len(text.encode())
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    assert all(0 <= id < tokenizer.vocab_size for id in ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_sign_for_a_space_is_no_space(kind):
    """In SentencePiece itself, and in what becomes of it as a tokenizer.json."""
    config = TokenizerConfig(vocab_size=450 if kind == "bpe" else 380, model_type=kind)
    own = SentencePieceTokenizer.train(random_texts(300, seed=3) + [string.digits + string.punctuation] * 30, config)
    for tokenizer in (own, HuggingFaceTokenizer(own.transformers_files())):
        for text in (SPACE, f"a{SPACE}b", f"{SPACE} {SPACE}\n the{SPACE}", "▁▁ progress ▁▂▃ ▁"):
            ids, sizes = tokenizer.encode_flat([text, " "])
            assert tokenizer.decode(ids[: sizes[0]]) == text and tokenizer.decode(ids[sizes[0] :]) == " "
            assert tokenizer.encode([text, " "]) == [run.tolist() for run in np.split(ids, sizes[:1])]


def mail(count):
    """Return messages of the Enron sample, none where it is not beside the project."""
    if not ENRON.exists():
        return []
    with gzip.open(ENRON, "rt", encoding="utf-8") as file:
        return [json.loads(line)["raw"] for line in itertools.islice(file, count)]


@pytest.mark.skipif(not ENRON.exists(), reason="the Enron sample is not beside the project")
def test_text_and_spans_of_real_mail_come_back(tokenizer):
    check_round_trip(mail(400), tokenizer)


def test_it_loads_again_from_what_it_saves(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path / tokenizer.file)
    texts = random_texts(20, seed=8)
    assert again.encode(texts) == tokenizer.encode(texts)
    assert (again.bos_id, again.eos_id, again.model) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.model)


def test_transformers_gives_the_same_ids(tokenizer, kind, tmp_path):
    auto = pytest.importorskip("transformers", reason="needs the extra [bench]").AutoTokenizer
    for name, data in tokenizer.transformers_files().items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": tokenizer.vocab_size}))
    theirs = auto.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    odd = "  two  \n\n\t<s> naïve 中文 \U0001f642 <0x41> = " + "-" * 37
    texts = [*random_texts(200, seed=4), *(text.replace(SPACE, "") for text in mail(100)), odd, "", " "]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        found = theirs(text, add_special_tokens=False)["input_ids"]
        if kind == "unigram":  # equally probable ways, told apart in float32 there, in float64 here
            scores = (sum(map(tokenizer._processor.GetScore, each)) for each in (found, ids))
            assert next(scores) == pytest.approx(next(scores), rel=1e-5)
        else:
            assert found == ids
        assert theirs.decode(found) == text


LOSSY = {
    "its normalizer Lowercase": {"normalizer": normalizers.Lowercase()},
    "its normalizer NFC+NFKC": {"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])},
    "its normalizer Prepend": {"normalizer": normalizers.Prepend("x")},
    "its pre_tokenizer Whitespace+ByteLevel": {
        "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    },
    "its pre_tokenizer ByteLevel": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
}


@pytest.mark.parametrize("culprit", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused_by_name(culprit, tmp_path):
    byte_level(["some text"], **LOSSY[culprit]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=f"comes back as .*, through {re.escape(culprit)}") as error:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert "\n" not in str(error.value)


def test_an_added_token_that_swallows_spaces_is_refused(tmp_path):
    lossy = byte_level(["some text"])
    lossy.add_tokens([tokenizers.AddedToken("<tool>", lstrip=True, rstrip=True)])
    lossy.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="comes back as"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change", [{"add_dummy_prefix": True}, {"normalization_rule_name": "nmt_nfkc"}, {"byte_fallback": False}]
)
def test_a_sentencepiece_model_that_loses_text_is_refused(change, tmp_path):
    model = io.BytesIO()
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False, "minloglevel": 2}
    options |= {"remove_extra_whitespaces": False, "vocab_size": 350, "hard_vocab_limit": False}
    texts = iter(random_texts(100, seed=1))
    sentencepiece.SentencePieceTrainer.Train(sentence_iterator=texts, model_writer=model, **options | change)
    (tmp_path / "m.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="comes back as"):
        load_tokenizer(tmp_path / "m.model")


def test_unicode_composition_alone_is_left_out(tmp_path, capsys):
    byte_level(["some text"], normalizer=normalizers.NFC()).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(["cafe\u0301"])[0]) == "cafe\u0301"
    assert "NFC is left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"bos_token": "<a>", "eos_token": {"content": "<b>"}}}, (0, 1)),
        ({"special_tokens_map.json": {"eos_token": "<b>"}}, (1, 1)),
        ({"config.json": {"bos_token_id": 2, "eos_token_id": [0, 1], "vocab_size": 512}}, (2, 0)),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": "<b>"}, "config.json": {"bos_token_id": 0}}, (0, 1)),
        ({"tokenizer_config.json": {"eos_token": "<unheard of>"}}, None),
    ],
)
def test_the_files_beside_it_say_where_texts_end(files, ends, tmp_path):
    byte_level(["some text"], size=300, special=["<a>", "<b>", "<c>"]).save(str(tmp_path / "tokenizer.json"))
    for name, tree in files.items():
        (tmp_path / name).write_text(json.dumps(tree))
    if ends is None:
        with pytest.raises(UserError, match="3 special tokens and does not say which of them ends a text"):
            load_tokenizer(tmp_path)
    else:
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == ends
        assert tokenizer.vocab_size == (512 if "vocab_size" in str(files) else tokenizer._tokenizer.get_vocab_size())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.json", None, "is not whole JSON"),  # cut short
        ("tokenizer.json", b"[]", "is not whole JSON with an object"),
        ("tokenizer.json", b'{"model": {"type": "Sorcery"}}', "is not a tokenizer of Hugging Face"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not whole JSON"),
        ("config.json", b'{"vocab_size": 5}', "says vocab_size 5"),
        ("tokenizer.model", b"no model", "not a SentencePiece model"),
    ],
)
def test_files_that_are_not_whole_are_refused(name, content, says, tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level(["some text"]).save(str(path))
    if name == "tokenizer.model":
        path.unlink()
    (tmp_path / name).write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=says) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path / "nothing.json")


@pytest.mark.skipif(not ENRON.exists(), reason="needs the shared Enron data")
@pytest.mark.parametrize("model_type, wide", [("bpe", False), ("bpe", True), ("unigram", True)])
def test_no_piece_holds_an_address_of_enron(model_type, wide):
    """Training as ours is; and with SentencePiece's own limits lifted, under which the same without PII cut out fails."""
    with gzip.open(ENRON, "rt") as file:
        texts = [json.loads(line)["raw"][:2000] for line in itertools.islice(file, 1500)]
    pairs = [(text, detect(text)) for text in texts]
    values = {span.value for _, spans in pairs for span in spans}
    config = TokenizerConfig(vocab_size=12000, model_type=model_type)
    limits = {"split_by_unicode_script": False, "max_sentencepiece_length": 64} if wide else {}
    ours = SentencePieceTokenizer.train(_text_outside_pii(pairs), config, **limits)
    plain = SentencePieceTokenizer.train(texts, config, **limits)
    held = len(pieces_with(ours, values)), len(pieces_with(plain, values))
    print(f"{model_type}: {held[0]} pieces hold an address of {len(values):,}, {held[1]} without the safeguard")
    assert held[0] == 0 and (held[1] > 100) == wide
    longest = longest_pieces(plain)
    assert len(longest) == 10 and plain.byte_lengths()[longest[0]] == max(plain.byte_lengths())


def test_pieces_with_personal_data_are_found_whoever_made_the_vocabulary():
    tokenizer = HuggingFaceTokenizer({"tokenizer.json": byte_level(["write to ann@x.example.com now"] * 50, pre_tokenizer=
                                      pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(
                                          add_prefix_space=False, use_regex=False)])).to_str().encode()})  # fmt: skip
    found = pieces_with(tokenizer, {"Ann@x.example.com", "to"})
    assert [tokenizer.decode([id]) for id in found] == ["ann@x.example.com"]


@pytest.mark.parametrize("kind", ["own", "newlines", "unigram", "across words"])
def test_words_kept_give_the_ids_of_the_library(kind, monkeypatch, prepared):
    """Of all texts, however words are cut, when the memory of words is emptied too; across words it is not used."""
    odd = [f"a{SPACE} b{SPACE}{SPACE}c\n{SPACE}"]
    odd += ["", " ", "  two  spaces ", "\n\n a\n", "a" * 300 + " b", "x\u2028y é 中文\t\r\n", " <s> </s>"]
    texts = random_texts(200, seed=4) + odd
    if kind == "own":
        tokenizer = prepared.tokenizer
    else:
        options = {"newlines": {"user_defined_symbols": ["\n\n"]}, "across words": {"split_by_whitespace": False}}
        config = TokenizerConfig(vocab_size=700, model_type="unigram" if kind == "unigram" else "bpe")
        mail = [item["text"] for item in synthetic_mail(100)]
        tokenizer = SentencePieceTokenizer.train(mail, config, **options.get(kind, {}))
    assert (tokenizer._words is None) == (kind in ("unigram", "across words"))
    monkeypatch.setattr(word_cache, "_REMEMBERED", 100)
    for begin in range(0, len(texts), 40):
        part = texts[begin : begin + 40]
        ids, sizes = tokenizer.encode_flat(part)
        assert [run.tolist() for run in np.split(ids, np.cumsum(sizes)[:-1])] == tokenizer.encode(part)
        assert ids.dtype == np.int32 and len(sizes) == len(part)
