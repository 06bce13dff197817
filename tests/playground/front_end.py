"""A server's front end with the plugin, whose model answers what a question asks for: what no real one does at will."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from vllm_steer.offline.demo.server import free_port
from vllm_steer.serving.middleware import SteeringMiddleware

MODEL = "model<b>"
MARKUP = '<img src=x onerror="document.title = 1"><script>document.title = 2</script>'
LONG = "word " * 50_000


class FrontEnd:
    """The front end.

    Attributes:
        bodies: What was asked.
        left: Answers whose clients hung up.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.left = 0
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes, middleware=[Middleware(SteeringMiddleware)])

    async def _models(self, request: Request) -> Response:
        card = {"id": MODEL, "object": "model", "owned_by": "vllm", "parent": None}
        return JSONResponse({"object": "list", "data": [card]})

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        question = body["messages"][-1]["content"]
        if question.isdigit():
            error = {"message": f"{MARKUP} is refused", "code": int(question)}
            return JSONResponse({"error": error}, int(question))
        return StreamingResponse(self._events(question), media_type="text/event-stream")

    async def _events(self, question: str) -> AsyncIterator[str]:
        def event(value: Any) -> str:
            return f"data: {json.dumps(value)}\n\n"

        def chunk(text: str, **more: Any) -> str:
            choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}
            return event({"choices": [choice]})

        yield chunk("It begins ")
        if question == "error":
            yield event({"error": {"message": f"{MARKUP} broke", "code": 500}})
        elif question == "nonsense":
            yield "data: 3\n\n"
        elif question == "cut":
            return
        elif question == "endless":
            try:
                while True:
                    yield chunk("and goes on ")
                    await asyncio.sleep(0.02)
            finally:
                self.left += 1
        else:
            yield chunk({"markup": MARKUP, "long": LONG}.get(question, question))
            yield chunk("", finish_reason="stop", stop_reason=MARKUP)
        yield "data: [DONE]\n\n"


@contextmanager
def served(front_end: FrontEnd) -> Iterator[str]:
    """Serves it until the block ends; gives its URL."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(front_end.app, port=port, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)
