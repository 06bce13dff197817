"""A language model at any OpenAI-compatible chat-completions endpoint, asked many things at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI, OpenAIError
from tqdm import tqdm

logger = logging.getLogger(__name__)

_PROBE = "Are you ready?"
# Statuses of endpoints whose template refuses a message: vLLM, TGI, llama.cpp.
_REFUSALS = (400, 422, 500)


@dataclass(frozen=True)
class Told:
    """What the model is told.

    Attributes:
        instructions: What it does; the system message, where the endpoint's template has one.
        text: What it does that to; the user message.
    """

    instructions: str
    text: str

    def messages(self, system_role: bool) -> list[dict[str, str]]:
        """Returns the messages; without a system role the instructions begin the user message."""
        if not system_role:
            return [{"role": "user", "content": f"{self.instructions}\n\n{self.text}"}]
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": self.text},
        ]


@dataclass(frozen=True)
class Reply:
    """What the model answers.

    Attributes:
        text: Its text; None where the request failed.
        error: Why it failed; empty otherwise.
    """

    text: str | None
    error: str = ""


@dataclass(frozen=True)
class ChatEndpoint:
    """An endpoint that is sent one request for each thing that it is told, at temperature 0.

    Attributes:
        url: Base URL, ending in ``/v1``.
        model: Model at the endpoint.
        api_key: Key of the endpoint.
        concurrency: Concurrent requests.
        retries: Retries of a request that failed in transport.
        timeout: Time limit of a request in seconds.
        max_tokens: Longest reply.
    """

    url: str
    model: str
    api_key: str = field(default="none", repr=False)
    concurrency: int = 16
    retries: int = 4
    timeout: float = 60.0
    max_tokens: int = 200

    def ask(self, told: Sequence[Told], progress: str = "judging") -> list[Reply]:
        """Returns the reply to each, in order; a request that finally fails is a reply without text.

        Args:
            told: What the model is told, one request each.
            progress: Label of the progress bar.
        """
        return asyncio.run(self._ask_all(told, progress))

    async def _ask_all(self, told: Sequence[Told], progress: str) -> list[Reply]:
        places = asyncio.Semaphore(self.concurrency)
        client = AsyncOpenAI(
            base_url=self.url,
            api_key=self.api_key,
            max_retries=self.retries,
            timeout=self.timeout,
        )
        async with client:
            instructions = told[0].instructions if told else ""
            system_role = await self._takes_system(client, instructions)
            with tqdm(total=len(told), desc=progress, unit="answer") as bar:

                async def one(each: Told) -> Reply:
                    async with places:
                        reply = await self._ask(client, each.messages(system_role))
                    bar.update()
                    return reply

                return list(await asyncio.gather(*map(one, told)))

    async def _takes_system(self, client: AsyncOpenAI, instructions: str) -> bool:
        """Returns whether the endpoint renders a system message; True if that is unknown.

        Only the endpoint has the template, so it is sent one short request, and if it refuses that, the same
        without the role. If it accepts the second, the role is at fault.
        """
        probe = Told(instructions, _PROBE)
        try:
            await self._complete(client, probe.messages(True), 1)
            return True
        except OpenAIError as error:
            if getattr(error, "status_code", None) not in _REFUSALS:
                return True
        try:
            await self._complete(client, probe.messages(False), 1)
        except OpenAIError:
            return True
        logger.warning(
            "the judge %s refuses the system role: its instructions begin the user message",
            self.model,
        )
        return False

    async def _complete(
        self, client: AsyncOpenAI, messages: list[dict[str, str]], max_tokens: int
    ) -> Any:
        return await client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=0.0,
            max_tokens=max_tokens,
        )

    async def _ask(self, client: AsyncOpenAI, messages: list[dict[str, str]]) -> Reply:
        try:
            response = await self._complete(client, messages, self.max_tokens)
        except OpenAIError as error:
            return Reply(None, f"{type(error).__name__}: {error}")
        if not response.choices:
            return Reply(None, "the reply has no choice")
        return Reply(response.choices[0].message.content or "")
