"""Data files, checked line by line, to examples as token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import ExtractionError, explain_faults
from vllm_steer.offline.files import read_text
from vllm_steer.offline.models.prompts import render_question
from vllm_steer.offline.train.examples import Answered, Contrast, Preference, Tokens

_Text = Annotated[str, Field(min_length=1, max_length=2**20)]
L = TypeVar("L", bound=BaseModel)


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AnsweredLine(_Line):
    """A line of a file for ``likelihood``, ``reft_r1``, ``loreft``, ``prosv`` or ``jola``.

    Attributes:
        prompt: What the user says.
        answer: What is to become likely.
        prefixed: What the user says where the model answers so by itself, of which the gap is measured.
    """

    prompt: _Text
    answer: _Text
    prefixed: _Text | None = None


class PreferenceLine(_Line):
    """A line of a file for ``bipo``.

    Attributes:
        prompt: What the user says.
        positive: An answer that shows the behaviour.
        negative: One that does not.
    """

    prompt: _Text
    positive: _Text
    negative: _Text


class ContrastLine(_Line):
    """A line of a file for ``cdas``.

    Attributes:
        prompt: What the user says, without the concept.
        prefixed: What the user says, with it.
        positive: The answer to the one with it.
        negative: The answer to the one without.
    """

    prompt: _Text
    prefixed: _Text
    positive: _Text
    negative: _Text


LINES: Mapping[type[Any], type[_Line]] = {
    Answered: AnsweredLine,
    Preference: PreferenceLine,
    Contrast: ContrastLine,
}
"""What a line of a file says, by the examples that are made of it."""


def read_lines_of(kind: type[L], file: Path) -> list[L]:
    """Reads a file of JSON objects, one in each line; empty lines are passed over.

    Args:
        kind: What each line must be.
        file: The file, in UTF-8. White space in texts is kept, since it decides the tokens.

    Raises:
        ExtractionError: It cannot be read, has fewer than two lines, or a line is no such object or the same as
            another; the message says which.
    """
    found: list[L] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(read_text(file, ExtractionError).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError as error:
            wanted = ", ".join(
                name if field.is_required() else f"perhaps {name}"
                for name, field in kind.model_fields.items()
            )
            raise ExtractionError(
                f"{file}, line {number}: must be a JSON object with {wanted}: {explain_faults(error, 'line')}"
            ) from error
        key = found[-1].model_dump_json()
        if (first := seen.setdefault(key, number)) != number:
            raise ExtractionError(f"{file}, line {number}: is line {first} again; leave one out")
    if len(found) < 2:
        raise ExtractionError(
            f"{file}: has {len(found)} examples; two are needed at the least, and some dozens to learn from"
        )
    return found


class Encoder:
    """Texts to token ids: prompts by the chat template, answers after it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: bool) -> None:
        """Takes a tokenizer.

        Args:
            tokenizer: The model's, with the format that prompts are rendered by.
            end: Whether answers end with its token for the end.

        Raises:
            ExtractionError: It has no such token.
        """
        self._tokenizer = tokenizer
        self._end: Tokens = ()
        if end:
            if tokenizer.eos_token_id is None:
                raise ExtractionError(
                    "the tokenizer has no token for the end of an answer; give --no-end to train without"
                )
            self._end = (tokenizer.eos_token_id,)

    @property
    def template(self) -> int:
        """Tokens of the template before the user's text, at least the first of a prompt."""
        one, other = (self.prompt(text) for text in ("1", "2"))
        same = (a == b for a, b in zip(one, other, strict=False))
        return max(1, next((at for at, equal in enumerate(same) if not equal), 1))

    def prompt(self, text: str) -> Tokens:
        """Returns a user's text as a prompt."""
        return render_question(self._tokenizer, text, strip=False).token_ids

    def answer(self, text: str) -> Tokens:
        """Returns an answer, with its end."""
        ids = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if ids[-1:] == self._end else ids + self._end

    def examples(self, lines: Sequence[BaseModel]) -> list[Any]:
        """Returns the examples of lines."""
        return [self._made[type(line)](line) for line in lines]

    @property
    def _made(self) -> Mapping[type[BaseModel], Callable[[Any], Any]]:
        return {
            AnsweredLine: lambda line: Answered(
                self.prompt(line.prompt),
                self.answer(line.answer),
                None if line.prefixed is None else self.prompt(line.prefixed),
            ),
            PreferenceLine: lambda line: Preference(
                self.prompt(line.prompt), self.answer(line.positive), self.answer(line.negative)
            ),
            ContrastLine: lambda line: Contrast(
                self.prompt(line.prompt),
                self.prompt(line.prefixed),
                self.answer(line.negative),
                self.answer(line.positive),
            ),
        }
