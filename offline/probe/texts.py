"""Texts that probes are measured on, from files, and as the model reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import EvaluationError, ExtractionError, explain_faults, one_line
from vllm_steer.offline.files import read_text
from vllm_steer.offline.models.chat import template_arguments
from vllm_steer.offline.models.prompts import render_question

JSONL = ".jsonl"
_LINE = 300


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Message(_Strict):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(min_length=1)]


class JsonText(_Strict):
    """A line of a JSONL file.

    Attributes:
        prompt: A text as it stands, without chat template, as ``/v1/completions`` takes it.
        messages: A conversation, rendered by the chat template, as ``/v1/chat/completions`` takes it.
    """

    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[tuple[Message, ...], Field(min_length=1, strict=False)] | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> JsonText:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("text", "give either prompt or messages")
        return self


@dataclass(frozen=True)
class Text:
    """A text of a file.

    Attributes:
        where: File and line, for messages.
        content: What a user says, or what a line of JSONL gives.
    """

    where: str
    content: str | JsonText

    @property
    def key(self) -> str:
        """Equal for equal texts."""
        found = self.content
        return found if isinstance(found, str) else found.model_dump_json(exclude_none=True)

    @property
    def answered(self) -> bool:
        """Whether it ends with an answer of the model."""
        messages = None if isinstance(self.content, str) else self.content.messages
        return messages is not None and messages[-1].role == "assistant"


def read_texts(file: Path) -> list[Text]:
    """Returns the texts of a file, one a line; empty lines are left out.

    A line is what a user says, or in a file ``*.jsonl`` an object, :class:`JsonText`.

    Raises:
        EvaluationError: The file cannot be read, is empty, or a line is malformed or there twice; the message names it.
    """
    texts: list[Text] = []
    seen: dict[str, str] = {}
    # Not by splitlines, which also parts lines of JSON at characters that strings may hold.
    for number, line in enumerate(read_text(file, EvaluationError).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        text = Text(where, _parsed(where, line) if file.suffix == JSONL else line.strip())
        if text.key in seen:
            raise EvaluationError(
                f"{where}: the text of {seen[text.key]} again; one text on both sides of the halves would make figures "
                f"better than they are: remove it"
            )
        seen[text.key] = where
        texts.append(text)
    if not texts:
        raise EvaluationError(f"{file} has no text; give one a line")
    return texts


def check_apart(positive: Sequence[Text], negative: Sequence[Text]) -> None:
    """Checks that no text is of both kinds.

    Raises:
        EvaluationError: One is.
    """
    known = {text.key: text.where for text in positive}
    for text in negative:
        if text.key in known:
            raise EvaluationError(
                f"{text.where}: the text of {known[text.key]}, so it would be positive and negative at once; remove one"
            )


def digest_of(texts: Sequence[Text]) -> str:
    """Returns the digest of some texts in their order."""
    return hashlib.sha256("\n".join(text.key for text in texts).encode()).hexdigest()


def rendered(tokenizer: PreTrainedTokenizerBase, text: Text) -> tuple[int, ...]:
    """Returns the tokens of a text.

    Args:
        tokenizer: The model's, with the format of the pack.
        text: The text.

    Raises:
        EvaluationError: It cannot be rendered; the message names its line.
    """
    found = text.content
    try:
        if isinstance(found, str):
            return render_question(tokenizer, found).token_ids
        if found.messages is None:
            return tuple(cast(list[int], tokenizer(found.prompt)["input_ids"]))
        shown = tokenizer.apply_chat_template(
            [message.model_dump() for message in found.messages],
            tokenize=False,
            add_generation_prompt=not text.answered,
            **template_arguments(tokenizer),
        )
        return tuple(cast(list[int], tokenizer(shown, add_special_tokens=False)["input_ids"]))
    except ExtractionError as error:
        raise EvaluationError(f"{text.where}: {error}") from error
    # A template is a program, and may fail in any way.
    except Exception as error:
        raise EvaluationError(
            f"{text.where}: the chat template refuses it: {one_line(error, _LINE)}"
        ) from error


def _parsed(where: str, line: str) -> JsonText:
    try:
        return JsonText.model_validate_json(line)
    except ValidationError as error:
        raise EvaluationError(
            f'{where}: {explain_faults(error, "text")}; a line must be {{"prompt": "..."}} or '
            f'{{"messages": [{{"role": "user", "content": "..."}}]}}'
        ) from error
