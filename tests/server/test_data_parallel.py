"""Two data-parallel engines behind two API servers answer as one engine does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.cases import CASES
from vllm_steer.offline.demo.server import SERVED_NAME, serve
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.verify.oracle import Reference

pytestmark = [pytest.mark.server, pytest.mark.slow]
TOKENS = 16


@pytest.mark.feature("data parallel, several API servers", "exact")
def test_data_parallel_equals_hooks(
    model: Path,
    packs: list[SteeringPack],
    prompts: list[list[int]],
    reference: Reference,
    tmp_path: Path,
) -> None:
    def complete(url: str, prompt: list[int], steering: dict[str, Any] | None) -> list[int]:
        body = {
            "model": SERVED_NAME,
            "prompt": prompt,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_tokens_as_token_ids": True,
        }
        response = httpx.post(
            f"{url}/completions",
            json=body | ({"steering": steering} if steering else {}),
            timeout=120,
        )
        assert response.status_code == 200, response.text
        tokens = response.json()["choices"][0]["logprobs"]["tokens"]
        return [int(token.removeprefix("token_id:")) for token in tokens]

    # Rows for four sums in each of the server's 64 requests.
    options = ("--enforce-eager", "--data-parallel-size", "2", "--steering-rows", "257")
    with (
        serve(model, [pack.path for pack in packs], tmp_path / "log", *options) as server,
        ThreadPoolExecutor(len(CASES)) as pool,
    ):
        # Three rounds, so that each case meets both engines.
        for _ in range(3):
            urls = [server.url] * len(CASES)
            for case, prompt, tokens in zip(
                CASES, prompts, pool.map(complete, urls, prompts, CASES.values()), strict=True
            ):
                expected = reference.generate(prompt, CASES[case], TOKENS)
                assert tokens == expected.tokens, case
        log = server.log.read_text()
    assert "EngineCore_DP0" in log
    assert "EngineCore_DP1" in log
