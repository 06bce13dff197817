"""vLLM's compile cache never hands a steered engine the graph of an unsteered one; packs are no part of its key.

vLLM compiles piecewise, with a cache of artifacts, on GPUs; on CPU it compiles anew each time. So
these engines are told to compile as on a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import engine_arguments
from tests.engine.cases import CASES
from tests.engine.test_reads import READ_CASES, assert_scores_equal_hooks
from vllm_steer.errors import EngineError
from vllm_steer.packs.pack import SteeringPack
from vllm_steer.testing.engine import Engine
from vllm_steer.testing.parity import assert_equals_hooks
from vllm_steer.testing.random_pack import write_variant
from vllm_steer.verify.oracle import Reference

pytestmark = pytest.mark.engine
TOKENS = 8
PIECEWISE = {
    "compilation_config": {
        "mode": 3,
        "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
    }
}


def environment(cache: Path) -> dict[str, str]:
    """Of an engine in one process, with a compile cache of its own."""
    return {"VLLM_CACHE_ROOT": str(cache), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def compile_as_on_a_gpu() -> None:
    """Keeps the CPU platform from choosing its own way of compiling."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def keep_mode(cls: type, vllm_config: object) -> None:
        compilation = vllm_config.compilation_config
        mode = compilation.mode
        check(cls, vllm_config)
        if mode == CompilationMode.VLLM_COMPILE:
            compilation.mode, compilation.compile_sizes = mode, []

    CpuPlatform.check_and_update_config = classmethod(keep_mode)
    # It handles operators that exist on GPUs alone.
    FixFunctionalizationPass.__call__ = lambda self, graph: None


def leave_the_salt_out() -> None:
    """Computes the key of the compile cache as if steering were not in the configuration."""
    from vllm.config import VllmConfig

    compute_hash = VllmConfig.compute_hash

    def without(self: VllmConfig) -> str:
        kept, self.additional_config = self.additional_config, {}
        try:
            return compute_hash(self)
        finally:
            self.additional_config = kept

    VllmConfig.compute_hash = without


@pytest.mark.feature("compile cache", "keyed by the steering")
def test_a_cached_unsteered_graph_is_not_reused(
    model: Path,
    packs: list[SteeringPack],
    prompts: list[list[int]],
    reference: Reference,
    tmp_path: Path,
) -> None:
    env = environment(tmp_path)
    # The same environment, started without steering.
    plain = engine_arguments(model, packs, "plain-compiled") | PIECEWISE
    steered = engine_arguments(model, packs, "compiled") | PIECEWISE
    unsteered_engine = Engine(plain, env, [compile_as_on_a_gpu])
    unsteered_engine.generate(prompts[:1], [None], TOKENS)
    unsteered_engine.close()
    # Without the salt the unsteered graph is found; nothing but the self-test would notice.
    with pytest.raises(EngineError, match="the model would run unsteered"):
        Engine(steered, env, [compile_as_on_a_gpu, leave_the_salt_out])
    # With it a graph of its own is compiled, which the next engine finds, though its packs are others.
    others = [
        write_variant(pack, tmp_path / "others" / pack.name, pack.name, -1.0) for pack in packs
    ]
    elsewhere = engine_arguments(model, others, "compiled") | PIECEWISE
    compiled = []
    for arguments, hooks in ((steered, reference), (elsewhere, Reference(model, others))):
        engine = Engine(arguments, env, [compile_as_on_a_gpu])
        outputs = engine.generate(prompts, list(CASES.values()), TOKENS)
        engine.close()
        assert_equals_hooks(hooks, prompts, CASES.values(), outputs, TOKENS)
        compiled.append(sorted((tmp_path / "torch_compile_cache").iterdir()))
    assert compiled[0] == compiled[1]


def test_reads_in_piecewise_graphs_that_are_found_again(
    model: Path,
    packs: list[SteeringPack],
    prompts: list[list[int]],
    reference: Reference,
    tmp_path: Path,
) -> None:
    """The graph writes scores into a buffer of its module, which a cached graph has to find again."""
    env = environment(tmp_path)
    arguments = engine_arguments(model, packs, "reads-compiled") | PIECEWISE
    steerings = list(READ_CASES.values())
    given, keys = prompts[: len(steerings)], set()
    for _ in range(2):
        engine = Engine(arguments, env, [compile_as_on_a_gpu])
        outputs = engine.generate(given, steerings, TOKENS)
        keys.add(engine.config_hash())
        engine.close()
        assert_equals_hooks(reference, given, steerings, outputs, TOKENS)
        assert_scores_equal_hooks(reference, given, steerings, outputs)
    assert len(keys) == 1
