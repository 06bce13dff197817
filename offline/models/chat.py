"""The format of a conversation: the template and the arguments that prompts are rendered with.

A base model has no template, and a thinking model's template asks whether it should think. Both are
settings of what is learned, so a pack records them, and all code that renders prompts for the pack reads them
from it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from transformers import PreTrainedTokenizerBase

from vllm_steer.errors import ExtractionError, explain_faults
from vllm_steer.offline.files import read_text
from vllm_steer.packs.pack import SteeringPack

PLAIN = "plain"
"""In the place of a template: texts as they stand, without any."""
_ARGUMENTS = "chat_template_kwargs"
# Template arguments that are also names of the rendering function's parameters.
_OF_TEMPLATES = ("tools", "documents")


class ChatFormat(BaseModel):
    """The format of prompts.

    Attributes:
        chat_template: A Jinja template; ``plain`` for verbatim text; None for the tokenizer's own.
        chat_template_kwargs: Arguments of the template, such as ``enable_thinking``.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    chat_template: str | None = Field(default=None, min_length=1)
    chat_template_kwargs: dict[str, JsonValue] = {}

    @classmethod
    def of_pack(cls, pack: SteeringPack) -> ChatFormat:
        """Returns the format that a pack was learned with.

        Raises:
            ExtractionError: The pack's record is not a format.
        """
        try:
            return cls.model_validate(pack.manifest.method.settings)
        except ValidationError as error:
            faults = explain_faults(error, "method.settings")
            raise ExtractionError(f"steering pack {pack.name!r}: {faults}") from error

    @classmethod
    def of_packs(cls, packs: Sequence[SteeringPack]) -> ChatFormat:
        """Returns the format that packs share; the tokenizer's own without packs.

        Raises:
            ExtractionError: They do not share one.
        """
        formats = [cls.of_pack(pack) for pack in packs] or [cls()]
        for pack, own in zip(packs, formats, strict=False):
            if own != formats[0]:
                raise ExtractionError(
                    f"steering packs {packs[0].name!r} and {pack.name!r} were learned with different chat templates or "
                    f"chat_template_kwargs; ask about them one at a time"
                )
        return formats[0]

    def apply_to(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Sets the format on a tokenizer, which then renders with it, and returns the tokenizer.

        Raises:
            ExtractionError: The template does not read one of the arguments, or there is none.
        """
        if self.chat_template is not None:
            tokenizer.chat_template = None if self.chat_template == PLAIN else self.chat_template
        tokenizer.init_kwargs[PLAIN] = self.chat_template == PLAIN
        own = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages"}
        for name in self.chat_template_kwargs:
            if name in own.difference(_OF_TEMPLATES):
                raise ExtractionError(
                    f"chat_template_kwargs: {name!r} is not the template's to be given"
                )
            if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template or "")):
                raise ExtractionError(
                    f"chat_template_kwargs: the chat template reads no {name!r}, so it would change nothing"
                )
        tokenizer.init_kwargs[_ARGUMENTS] = dict(self.chat_template_kwargs)
        return tokenizer


def template_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the arguments of a tokenizer's template that :meth:`ChatFormat.apply_to` has set."""
    return dict(tokenizer.init_kwargs.get(_ARGUMENTS, {}))


def plain_text(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> str:
    """Returns texts verbatim, after the tokenizer's beginning-of-text token.

    Args:
        tokenizer: A tokenizer without chat template.
        texts: The texts, in order; empty ones are left out.

    Raises:
        ExtractionError: Plain text was not requested.
    """
    if not tokenizer.init_kwargs.get(PLAIN):
        raise ExtractionError(
            "the tokenizer has no chat template, as that of a base model: give --chat-template FILE, a Jinja template, or "
            "--chat-template plain for texts as they stand, where the pack is made"
        )
    begun = list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return (str(tokenizer.bos_token) if begun else "") + "\n\n".join(filter(None, texts))


def read_template(given: str) -> str:
    """Returns the template of ``--chat-template``: the text of a file, or ``plain``.

    Raises:
        ExtractionError: The file cannot be read or is empty.
    """
    if given == PLAIN:
        return PLAIN
    text = read_text(Path(given), ExtractionError)
    if not text.strip():
        raise ExtractionError(f"--chat-template: {given} is empty; it must hold a Jinja template")
    return text
