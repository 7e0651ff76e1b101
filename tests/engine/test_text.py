"""Streaming detokenization that never tears a character, stop strings, and the tokenizer's refusals."""

import random
from pathlib import Path
from typing import cast

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from expertd.checkpoint.locate import find_checkpoint
from expertd.engine.text import Detokenizer, StopStrings, Tokenizer
from expertd.errors import CheckpointError, ConfigError
from tests.tiny import END_ID, make_tiny

REPLACEMENT = "\ufffd"
TEXTS = [
    "plain",
    " leading and  double spaces \n\n",
    "naïve façade, Grüße",
    "日本語のテキスト、中文，한국어",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 🇩🇪, 👍🏽",
    "mixed: a日b👍c\u0301d\ufffde",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), "qwen3_moe")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder, {"eos_token_id": END_ID})


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
    """The token of each byte: every text of one character tells some of them."""
    ids: dict[int, int] = {}
    for code in [*range(0x110), *range(0x400, 0xD800, 0x40), *range(0x10000, 0x110000, 0x4000)]:
        ids |= zip(chr(code).encode(), tokenizer.encode(chr(code)), strict=True)
    unused = sorted(set(range(256)) - set(ids.values()))
    missing = sorted(set(range(256)) - set(ids))  # bytes that no UTF-8 text has: any tokens will do for them
    return ids | dict(zip(missing, unused, strict=True))


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_are_never_torn(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    done = 0
    for i, piece in enumerate(pieces[:-1]):
        assert REPLACEMENT not in piece or REPLACEMENT in text
        done += len(piece)
        if REPLACEMENT not in text:  # as soon as a character is whole, and no sooner
            assert text[:done] == text.encode()[: i + 1].decode(errors="ignore")


def test_every_character_class_of_utf8(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(30):
        text = "".join(chr(rng.choice([0x41, 0xE9, 0x4E2D, 0xFFFC, 0x1F600])) for _ in range(12))
        assert "".join(stream(tokenizer, tokenizer.encode(text))) == text


def test_random_bytes_equal_the_whole_decoded(tokenizer: Tokenizer, byte_ids: dict[int, int]) -> None:
    rng = random.Random(1)
    heads = [0xC3, 0xE4, 0xF0, 0x80, 0xFF, 0x41, 0xEF, 0xBF, 0xBD, 0x20]
    for _ in range(100):
        data = [rng.choice([rng.randrange(256), rng.choice(heads)]) for _ in range(rng.randrange(20))]
        ids = [byte_ids[b] for b in data]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids), bytes(data)


def test_incomplete_character_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok 中")[:-1]
    assert stream(tokenizer, ids) == ["o", "k", " ", "", "", REPLACEMENT]


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), END_ID, *tokenizer.encode("b")]
    assert stream(tokenizer, ids) == ["a", "", "b", ""]
    assert tokenizer.end_ids == {END_ID}


class Words:
    """Decodes as SentencePiece does: a space before every word but the first."""

    def decode(self, ids: list[int], marks: bool = False) -> str:
        return " ".join(f"w{i}" for i in ids)


def test_spaces_between_tokens_are_kept() -> None:
    tokenizer = cast(Tokenizer, Words())
    assert stream(tokenizer, [1, 2, 3, 4]) == ["w1", " w2", " w3", " w4", ""]


# Stop strings.


def until_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The slow twin: character by character, cut where the first stop string becomes complete."""
    for end in range(len(text) + 1):
        complete = [s for s in stops if s and text[:end].endswith(s)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def pieces_of(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def test_stop_strings_equal_the_slow_twin() -> None:
    rng = random.Random(2)
    num_found = 0
    for _ in range(5000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(16)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(7))) for _ in range(rng.randrange(4))]
        machine, out = StopStrings(stops), ""
        for piece in pieces_of(text, rng):
            out += machine.add(piece)
            if machine.found:
                break
        out += machine.finish()
        assert (out, machine.found) == until_stop(text, stops), (text, stops)
        num_found += machine.found
    assert 1000 < num_found < 4000


def test_text_is_held_back_no_longer_than_needed() -> None:
    machine = StopStrings(["<end>", "zz"])
    assert [machine.add(c) for c in "a<en<end"] == ["a", "", "", "", "<en", "", "", ""]
    assert machine.add("x") == "<endx"
    assert machine.add("z") == ""
    assert machine.finish() == "z"


# The tokenizer.


def test_chat_template_and_its_refusals(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids) == "user: hi\nassistant:"
    for file in folder.iterdir():
        if "template" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"chat_template"', '"not_used"'))
    with pytest.raises(ConfigError, match="no chat template"):
        Tokenizer(tmp_path, {}).encode_chat([])
    refusing = settings.read_text().replace(
        '"not_used": "', '"chat_template": "{{ raise_exception(\'no\') }}'
    )
    settings.write_text(refusing)
    with pytest.raises(ConfigError, match="chat template refuses them: no"):
        Tokenizer(tmp_path, {}).encode_chat([{"role": "user", "content": "hi"}])


def test_unreadable_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError) as error:
        Tokenizer(tmp_path, {})
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ends, expected", [(3, {3, END_ID}), ([3, 4], {3, 4, END_ID}), (None, {END_ID})])
def test_end_ids(folder: Path, ends: int | list[int] | None, expected: set[int]) -> None:
    assert Tokenizer(folder, {"eos_token_id": ends}).end_ids == expected


# The bytes of single tokens.


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_byte_level_vocabulary(tokenizer: Tokenizer, text: str) -> None:
    pieces = [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]
    assert b"".join(pieces) == text.encode() and {len(p) for p in pieces} == {1}


def test_every_byte_has_its_token(tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_bytes(i) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert tokenizer.token_bytes(END_ID) == b"<|endoftext|>"
    assert tokenizer.token_bytes(END_ID + 1) == b""  # a vocabulary padded to a round number


def test_bytes_of_added_tokens(folder: Path, tmp_path: Path) -> None:
    """They are written as they are, unless all of their letters are such in which the vocabulary writes bytes."""
    inner = PreTrainedTokenizerFast.from_pretrained(folder)
    inner.add_tokens(["<｜中｜>", "<é>"])
    inner.save_pretrained(tmp_path)
    added = Tokenizer(tmp_path, {})
    for text, data in (("<｜中｜>", "<｜中｜>".encode()), ("<é>", b"<\xe9>")):
        (token_id,) = added.encode(text)
        assert added.token_bytes(token_id) == data
        assert added.decode([token_id]) == data.decode(errors="replace")


def test_bytes_of_merged_tokens() -> None:
    demo = Tokenizer(find_checkpoint("demo"), {})
    ids = demo.encode("Once upon a time, naïve 日本 👍")
    pieces = [demo.token_bytes(i) for i in ids]
    assert b"".join(pieces) == "Once upon a time, naïve 日本 👍".encode()
    assert b" upon" in pieces and b"\xe6" in pieces
    assert all(
        demo.token_bytes(i).decode() == demo.decode([i]) for i in ids if REPLACEMENT not in demo.decode([i])
    )


@pytest.fixture(scope="module")
def with_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As SentencePiece's: words with their space before them, and a piece for each byte."""
    words = ["<unk>", "</s>", "▁", "▁the", "▁fox", "s", "é", "é<0x41>"]
    vocab = {piece: i for i, piece in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    folder = tmp_path_factory.mktemp("fallback")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)
    return Tokenizer(folder, {})


def test_bytes_of_a_vocabulary_with_byte_fallback(with_fallback: Tokenizer) -> None:
    named = ["▁the", "▁fox", "s", "é", "<0xE4>", "<0xB8>", "<0xAD>", "</s>", "é<0x41>", "<unk>"]
    ids = with_fallback.inner.convert_tokens_to_ids(named)
    assert [with_fallback.token_bytes(i) for i in ids] == [
        *(b" the", b" fox", b"s", "é".encode(), b"\xe4", b"\xb8", b"\xad", b"</s>"),
        *("é<0x41>".encode(), b"<unk>"),
    ]
    assert with_fallback.decode(ids[:8]) == "the foxsé中"  # its text has no space in front
    ids = with_fallback.encode("s 中👍")
    assert b"".join(with_fallback.token_bytes(i) for i in ids) == " s 中👍".encode()
