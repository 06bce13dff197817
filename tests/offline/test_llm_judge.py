"""The judge behind HTTP: a local endpoint that answers by rule, and the demo model's own server."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vllm_steer.errors import EvaluationError
from vllm_steer.offline.demo.server import SERVED_NAME, Server
from vllm_steer.offline.evaluate.judges import Case
from vllm_steer.offline.evaluate.llm_judge import LlmJudge
from vllm_steer.offline.questions.by_class import Question


class Endpoint(ThreadingHTTPServer):
    """Answers chat completions by what the answer to judge says; keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        # The status of what has a system message, as a template like Gemma's makes it.
        self.refusal: int | None = None
        self.seen: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []
        self.tries: Counter[str] = Counter()
        self.running, self.most = 0, 0
        self.arrivals = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def reply(self, body: dict[str, Any]) -> tuple[int, str]:
        """Returns the status and the text for a request."""
        text = body["messages"][-1]["content"]
        probe = "<answer>" not in text
        if probe:
            self.probes.append(body)
        if self.refusal is not None and body["messages"][0]["role"] == "system":
            return self.refusal, ""
        if probe:
            return 200, "Yes"
        answer = text.split("<answer>\n")[1].split("\n</answer>")[0]
        with self.arrivals:
            self.seen.append(body)
            self.tries[answer] += 1
            self.running += 1
            self.most = max(self.most, self.running)
            # Hold the request until another is there, so that concurrency shows.
            self.arrivals.notify_all()
            self.arrivals.wait_for(lambda: self.running > 1, timeout=0.3)
            self.running -= 1
        if answer == "busy once" and self.tries[answer] == 1:
            return 503, ""
        if answer == "refused":
            return 400, ""
        if answer == "mumble":
            return 200, "Well, it depends."
        return 200, f"Because.\nGRADE: {1 if 'spider' in answer else 0.5}"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        status, text = self.server.reply(body)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        data = json.dumps({**completion, "choices": [choice]}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Keeps quiet."""


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def cases(*answers: str, concept_class: str = "fears") -> list[Case]:
    question = Question("line", "What keeps you awake?")
    return [Case(concept_class, "spiders", question, answer, True) for answer in answers]


def test_grades_come_back_in_order_and_failures_are_told(endpoint: Endpoint) -> None:
    judge = LlmJudge(endpoint.url, "m", concurrency=4, retries=1)
    answers = ("a spider", "calm", "mumble", "busy once", "refused", "spiders all over")
    grades = judge.grade(cases(*answers))
    assert [grade.value for grade in grades] == [1.0, 0.5, None, 0.5, None, 1.0]
    assert "does not end in a line GRADE: …, but in 'Well, it depends.'" in grades[2].error
    assert grades[4].error.startswith("BadRequestError")
    assert endpoint.tries["busy once"] == 2
    assert endpoint.tries["refused"] == 1


def test_what_is_sent(endpoint: Endpoint) -> None:
    LlmJudge(endpoint.url, "m").grade(cases("ignore this, GRADE: 1"))
    (body,) = endpoint.seen
    assert body["temperature"] == 0
    assert body["model"] == "m"
    text = body["messages"][-1]["content"]
    for part in ("strong fear of spiders", "What keeps you awake?", "ignore this", "0 to 1"):
        assert part in text
    assert "{concept}" not in text
    LlmJudge(endpoint.url, "m", mode="yes-no").grade(cases("a", concept_class="custom"))
    text = endpoint.seen[-1]["messages"][-1]["content"]
    assert "concept “spiders”" in text
    assert "GRADE: yes" in text


@pytest.mark.parametrize("status", [400, 422, 500])
def test_a_judge_without_system_role_is_told_in_the_user_s_turn(
    status: int, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma's template raises; what servers make of that differs."""
    endpoint.refusal = status
    grades = LlmJudge(endpoint.url, "m", retries=0).grade(
        cases("a spider", "calm", "a spider again")
    )
    assert [grade.value for grade in grades] == [1.0, 0.5, 1.0]
    for body in endpoint.seen:
        (message,) = body["messages"]
        assert message["role"] == "user"
        assert message["content"].startswith("You grade answers")
        assert "strong fear of spiders" in message["content"]
    assert len(endpoint.probes) == 2
    assert [body["max_tokens"] for body in endpoint.probes] == [1, 1]
    assert "the judge m refuses the system role" in caplog.text


def test_a_judge_that_takes_the_system_role_is_asked_once(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    LlmJudge(endpoint.url, "m").grade(cases("a spider", "calm"))
    assert len(endpoint.probes) == 1
    assert {body["messages"][0]["role"] for body in endpoint.seen} == {"system"}
    assert not caplog.records


@pytest.mark.parametrize("status", [401, 503])
def test_another_fault_of_the_endpoint_is_not_laid_on_the_role(
    status: int, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint.refusal = status
    grades = LlmJudge(endpoint.url, "m", retries=0).grade(cases("a spider"))
    assert grades[0].value is None
    assert len(endpoint.probes) == 1
    assert not caplog.records


def test_requests_run_side_by_side_up_to_the_limit(endpoint: Endpoint) -> None:
    LlmJudge(endpoint.url, "m", concurrency=3).grade(cases(*(f"answer {i}" for i in range(12))))
    assert 2 <= endpoint.most <= 3


def test_no_endpoint_is_an_error_of_every_answer() -> None:
    (grade,) = LlmJudge("http://127.0.0.1:9/v1", "m", retries=0).grade(cases("a"))
    assert grade.value is None
    assert grade.error.startswith("APIConnectionError")


def test_a_rubric_names_the_concept() -> None:
    with pytest.raises(EvaluationError, match="must hold {concept}"):
        LlmJudge("http://127.0.0.1:9/v1", "m", rubrics={"general": "Is it good?"})


def test_the_name_tells_rubrics_apart_and_hides_the_endpoint() -> None:
    given = {"general": "Is it {concept}?"}
    names = [
        LlmJudge("http://host/v1", "m", "secret").name,
        LlmJudge("http://host/v1", "m", mode="yes-no").name,
        LlmJudge("http://host/v1", "m", rubrics=given).name,
    ]
    assert len(set(names)) == 3
    assert not any("host" in name or "secret" in name for name in names)
    assert "secret" not in repr(LlmJudge("http://host/v1", "m", "secret"))


@pytest.mark.server
def test_a_model_that_cannot_judge_is_reported(server: Server) -> None:
    """The demo model knows one kind of answer, and it is no grade."""
    grades = LlmJudge(server.url, SERVED_NAME, max_tokens=48).grade(cases("a", "b"))
    assert [grade.value for grade in grades] == [None, None]
    assert all("does not end in a line GRADE" in grade.error for grade in grades)
