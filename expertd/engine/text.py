"""Between text and token ids: the checkpoint's tokenizer, streaming detokenization, stop strings."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertd.dialect import Dialect
from expertd.errors import CheckpointError, ConfigError

REPLACEMENT = "\ufffd"
# SentencePiece writes a space so, and a byte without a piece of its own (byte fallback) so.
SPACE = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_letters() -> dict[str, int]:
    """The letters in which byte-level vocabularies write bytes (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_LETTERS = _byte_letters()


class Tokenizer:
    """The checkpoint's own tokenizer (transformers; never its remote code) and the ids that end a text."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        from transformers import AutoTokenizer, logging

        logging.set_verbosity_error()  # it warns of long prompts, which we refuse ourselves
        try:
            self.inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as e:
            reason = " ".join(str(e).split())[:200]
            raise CheckpointError(f"checkpoint {folder}: its tokenizer cannot be read: {reason}.") from e
        ends = config.get("eos_token_id")
        ids = ends if isinstance(ends, list) else [ends]
        self.end_ids = {i for i in [*ids, self.inner.eos_token_id] if isinstance(i, int)}
        self._byte_level = "ByteLevel" in _decoder_steps(self.inner)
        self._decode = _decoder(self.inner)
        self.speak(Dialect())

    def speak(self, dialect: Dialect) -> None:
        """Show the dialect's marks in chat answers, even if they are special tokens."""
        self.dialect = dialect
        self._hidden_ids = {i for i, token in self.inner.added_tokens_decoder.items() if token.special}
        self._hidden_ids -= {i for mark in dialect.marks for i in self._ids_of(mark)}
        self.think_start = self._ids_of(dialect.think_start)
        self.think_end = self._ids_of(dialect.think_end)
        self.end_ids |= {i for mark in dialect.ends for i in self._ids_of(mark)}

    def _ids_of(self, mark: str) -> list[int]:
        ids: list[int] = self.inner.encode(mark, add_special_tokens=False) if mark else []
        return ids

    @property
    def size(self) -> int:
        return len(self.inner)

    def for_grammars(self, vocab_size: int) -> Any:
        """The vocabulary as llguidance knows it, an LLTokenizer of `vocab_size` tokens. Raises ConfigError."""
        from llguidance import hf

        try:
            return hf.from_tokenizer(self.inner, n_vocab=vocab_size, eos_token=sorted(self.end_ids) or None)
        except Exception as e:
            reason = " ".join(str(e).split())[:200]
            raise ConfigError(f"this checkpoint's tokenizer cannot follow grammars: {reason}.") from e

    def opens_reasoning(self, ids: list[int]) -> bool:
        """Whether a prompt ends inside reasoning, as some chat templates have it."""
        start, end = _last(self.think_start, ids), _last(self.think_end, ids)
        return start > end

    def grammar_after(self, prompt: list[int]) -> list[int]:
        """The tokens of a chat answer after which its grammar begins; [] if it does at once."""
        if self.dialect.answer_start:
            return self._ids_of(self.dialect.answer_start)
        return self.think_end if self.opens_reasoning(prompt) else []

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.inner.encode(text)
        return ids

    def encode_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **template_args: Any
    ) -> list[int]:
        """Apply the chat template. Raises ConfigError when there is none or it refuses the messages."""
        if not self.inner.chat_template:
            raise ConfigError(
                "this checkpoint has no chat template. Use /v1/completions, or `expertd run` without --chat."
            )
        try:
            text: str = self.inner.apply_chat_template(
                messages, tools or None, tokenize=False, add_generation_prompt=True, **template_args
            )
        except Exception as e:
            raise ConfigError(
                f"messages: the checkpoint's chat template refuses them: {' '.join(str(e).split())}"
            ) from e
        ids: list[int] = self.inner.encode(text, add_special_tokens=False)
        return ids

    def decode(self, ids: list[int], marks: bool = False) -> str:
        """The text of token ids without special tokens, or, with `marks`, only with those that are marks."""
        return self._decode([i for i in ids if i not in self._hidden_ids] if marks else ids, not marks)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, in UTF-8: often a part of a character; b"" for an id without a token.

        A special token is written as it is in the vocabulary, though `decode` leaves it out.
        """
        piece: str | None = self.inner.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        # All letters or none, as the library decides it, for added tokens too.
        if self._byte_level and BYTE_LETTERS.keys() >= set(piece):
            return bytes(BYTE_LETTERS[letter] for letter in piece)
        if byte := BYTE_PIECE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        return piece.replace(SPACE, " ").encode()


def _decoder(inner: Any) -> Callable[[list[int], bool], str]:
    """Turns ids into text, without special tokens if the second argument says so.

    By the tokenizers library itself where transformers only passes on to it: 2 us for a token where that takes 6.
    """
    from transformers import PreTrainedTokenizerFast

    kind, stock = type(inner), PreTrainedTokenizerFast
    if isinstance(inner, stock) and (kind.decode, kind._decode) == (stock.decode, stock._decode):
        plain = inner.backend_tokenizer
        return lambda ids, skips: str(plain.decode(ids, skip_special_tokens=skips))
    return lambda ids, skips: str(
        inner.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
    )


def _last(mark: list[int], ids: list[int]) -> int:
    """Where a mark begins for the last time, -1 if it is not there or is none."""
    places = range(len(ids) - len(mark), -1, -1)
    return next((i for i in places if mark and ids[i : i + len(mark)] == mark), -1)


def _decoder_steps(inner: Any) -> set[str]:
    """The steps in which a tokenizer turns pieces into text, by the names that tokenizer.json gives them."""
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    decoder = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in decoder.get("decoders", [decoder])}


class Detokenizer:
    """Gives a text piece by piece as token ids come; a UTF-8 character is never torn.

    A token's text can depend on the tokens before it (leading spaces), so each piece is the difference
    between two decodings of a short tail: [start:] with the new ids and without them.
    """

    def __init__(self, tokenizer: Tokenizer, marks: bool = False) -> None:
        """`marks` shows those of the dialect (Tokenizer.decode)."""
        self._tokenizer, self._marks = tokenizer, marks
        self._ids: list[int] = []
        self._start = self._end = 0  # ids[:end] have been given out; ids[start:end] are their context

    def add(self, token_id: int) -> str:
        """Give the text that became final, often empty."""
        self._ids.append(token_id)
        text = self._new_text()
        if text.endswith(REPLACEMENT):  # the bytes so far end inside a character
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text

    def finish(self) -> str:
        """Give what is still held back: an incomplete character, as the replacement character."""
        text = self._new_text()
        self._start = self._end = len(self._ids)
        return text

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._end], self._marks)
        return self._tokenizer.decode(self._ids[self._start :], self._marks)[len(before) :]


class StopStrings:
    """Holds back text that may be the beginning of a stop string, and cuts at the first whole one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = [s for s in stops if s]
        self._held = ""
        self.found = False
        self.match = ""  # the one that was found

    def add(self, text: str) -> str:
        """Give the text that can no longer be part of a stop string; sets `found` when one is complete."""
        if not self._stops:  # the usual case, for every token
            return text
        text = self._held + text
        found = [(i + len(s), i, s) for s in self._stops if (i := text.find(s)) >= 0]
        if found:  # the first to be complete wins: the answer then depends on no token's boundaries
            _, at, self.match = min(found)
            self.found, self._held = True, ""
            return text[:at]
        keep = max((self._overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Give what was held back; the text ends here."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        longest = min(len(text), len(stop) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
