"""A tokenizer as the reader of prompts: chat frame, token counts, and protection against text that imitates special
tokens."""

from __future__ import annotations

import re
import unicodedata
from typing import Any
from weakref import WeakKeyDictionary

from ccpo.errors import UserError
from ccpo.teams.messages import ChatReader, Prompt

LATEST = 512  # prompts that a reader remembers

_readers: WeakKeyDictionary[Any, Reader] = WeakKeyDictionary()


def reader_of(tokenizer: Any) -> Reader | ChatReader:
    """The :class:`Reader` of a Hugging Face tokenizer, made once for each chat template that it is given; a :class:`ChatReader`
    is one already."""
    if isinstance(tokenizer, ChatReader):
        return tokenizer
    known = _readers.get(tokenizer)
    if known is None or known.template != getattr(tokenizer, "chat_template", None):
        known = _readers[tokenizer] = Reader(tokenizer)
    return known


class Reader:
    """What a prompt needs to know of a tokenizer.

    ``guarded`` are the texts that must not come out of what a model or a data file wrote: the tokens that the tokenizer
    calls special, and its added tokens in angle or square brackets, since some chat templates mark roles with tokens
    that are not called special.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template = getattr(tokenizer, "chat_template", None)
        self.chat = bool(self.template)
        self.system_role = self.chat and _shows_system(tokenizer)
        guarded = _guarded(tokenizer)
        breakable = sorted((t for t in guarded if len(t) > 1 and not re.search(r"\s", t)), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, breakable))) if breakable else None
        self._guarded_ids = frozenset(guarded.values())
        self._begin = () if self.chat else _beginning(tokenizer)
        self.expected: dict[Any, tuple[int, ...]] = {}  # special tokens of frames that were seen
        # the latest prompts: the samples of a problem ask for one N times
        self._prompts: dict[tuple[str, str | None], Prompt] = {}

    def frame(self, user: str, system: str | None) -> str:
        """The whole prompt around ``user``: through the chat template, or plain text where the tokenizer has none.

        A template without a system role gets the system prompt at the head of the user's message.
        """
        if self.system_role and system:
            return _apply(self.tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": user}])
        if system:
            user = f"{system}\n\n{user}"
        return _apply(self.tokenizer, [{"role": "user", "content": user}]) if self.chat else user

    def prompt(self, user: str, system: str | None) -> Prompt:
        """The framed prompt and its tokens."""
        known = self._prompts.get((user, system))
        if known is not None:
            return known
        text = self.frame(user, system)
        ids = self.ids(text)
        if len(self._prompts) >= LATEST:
            self._prompts.clear()
        return self._prompts.setdefault((user, system), Prompt(text=text, ids=ids, tokens=len(ids)))

    def ids(self, prompt: str) -> tuple[int, ...]:
        """Token ids of a framed prompt; a plain one begins with the token that the tokenizer begins texts with."""
        return (*self._begin, *self._encode(prompt))

    def marks(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The special tokens among ``ids``, in order."""
        return tuple(i for i in ids if i in self._guarded_ids)

    def length(self, text: str) -> int:
        return len(self._encode(text))

    def cut(self, text: str, limit: int, *, tail: bool = False) -> str:
        """The longest head (or tail) of ``text``, at a token's border, that has at most ``limit`` tokens."""
        if self.length(text) <= limit:
            return text
        for size in range(limit, 0, -1):
            piece = self._piece(text, size, tail)
            if self.length(piece) <= limit:
                return piece
        return ""

    def defuse(self, text: str) -> str:
        """``text`` with a space inside all that would be read as a special token (``<|im_end|>``: ``< |im_end|>``).

        Repeated, since breaking one token can leave another (``<<s>``). It ends: every break makes a run without spaces
        shorter.
        """
        while self._pattern is not None and self._pattern.search(text):
            text = self._pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _piece(self, text: str, size: int, tail: bool) -> str:
        if not self.tokenizer.is_fast:
            ids = self._encode(text)
            return self.tokenizer.decode(ids[-size:] if tail else ids[:size])
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        borders = encoded["offset_mapping"]
        return text[borders[-size][0] :] if tail else text[: borders[size - 1][1]]


def scatter(text: str) -> str:
    """``text`` with a space around every sign that is neither letter nor digit, in compatibility form.

    The heavy means, for text that makes a special token together with what stands beside it: no token with such a sign
    in it can be left.
    """
    plain = unicodedata.normalize("NFKC", text)
    return " " + re.sub(r"[^\w\s]|_", r" \g<0> ", plain) + " "


def _guarded(tokenizer: Any) -> dict[str, int]:
    tokens = {
        token.content: i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or re.fullmatch(r"<.+>|\[.+\]", token.content)
    }
    roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    # characters that a tokenizer does not know become its unknown token: that imitates nothing
    if tokenizer.unk_token is not None and tokenizer.unk_token not in roles:
        tokens.pop(tokenizer.unk_token, None)
    return tokens


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    ids = tokenizer("", verbose=False)["input_ids"]
    return (ids[0],) if ids and ids[0] == tokenizer.bos_token_id else ()


def _apply(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _shows_system(tokenizer: Any) -> bool:
    """Whether the chat template takes a system message: some refuse it, some leave it out without a word."""
    from jinja2.exceptions import TemplateError

    user = {"role": "user", "content": "question"}
    try:
        _apply(tokenizer, [user])
    except TemplateError as error:
        raise UserError(
            f"the chat template of tokenizer {tokenizer.name_or_path!r} cannot render a user's message: {error}. "
            "Use the tokenizer of an instruction-tuned model, or one without a chat template"
        ) from None
    try:
        return "instruction 7f3a" in _apply(tokenizer, [{"role": "system", "content": "instruction 7f3a"}, user])
    except TemplateError:
        return False
