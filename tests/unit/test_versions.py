"""Which vLLM may start, and the check of its files that stands behind the list."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.source_reader import ReadFile, SourceReader, folder_files
from tests.vllm_versions import faults, installed_reader
from vllm_steer.errors import CompatibilityError
from vllm_steer.plugin import register
from vllm_steer.vllm_compat import versions

PAGE = Path(__file__).parents[2] / "docs" / "install.md"


def test_the_files_of_the_installed_vllm_fit() -> None:
    assert list(faults(installed_reader())) == []


def changed(path: str, old: str, new: str) -> ReadFile:
    """The installed vLLM's files, one of them changed."""
    import vllm

    files = folder_files(Path(vllm.__file__).parents[1])
    text = files(path)
    assert text is not None
    assert old in text
    return lambda wanted: text.replace(old, new) if wanted == path else files(wanted)


@pytest.mark.parametrize(
    ("path", "old", "new", "fault"),
    [
        (
            "vllm/v1/core/kv_cache_utils.py",
            "request: Request, start_token_idx: int, end_token_idx: int\n",
            "request: Request, start: int, end: int\n",
            "_gen_prompt_embeds_extra_hash_keys takes ('request', 'start', 'end'), where",
        ),
        (
            "vllm/v1/worker/gpu_model_runner.py",
            "def _prepare_inputs(",
            "def _prepare_step(",
            "vllm.v1.worker.cpu_model_runner.CPUModelRunner._prepare_inputs is missing",
        ),
        (
            "vllm/v1/worker/gpu/model_runner.py",
            "self.model_state.preprocess_state(",
            "self.model_state.prepare_state(",
            "preprocess_state is not called in vllm.v1.worker.gpu.model_runner",
        ),
        (
            "vllm/config/parallel.py",
            "enable_dbo",
            "enable_overlap",
            "vllm.config.ParallelConfig has no field enable_dbo",
        ),
        (
            "vllm/entrypoints/openai/completion/protocol.py",
            "class CompletionRequest(OpenAIBaseModel)",
            "class CompletionRequest(BaseModel)",
            "CompletionRequest drops the fields that it does not know",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_named(path: str, old: str, new: str, fault: str) -> None:
    found = list(faults(SourceReader(changed(path, old, new))))
    assert any(fault in text for text in found), found


def test_a_module_that_is_gone_is_named() -> None:
    path = "vllm/v1/engine/input_processor.py"
    found = list(faults(SourceReader(changed(path, "", ""))))
    assert found == []
    files = changed(path, "", "")
    without = SourceReader(lambda wanted: None if wanted == path else files(wanted))
    assert "vllm.v1.engine.input_processor.InputProcessor.process_inputs is missing" in list(
        faults(without)
    )


def test_the_installed_version_is_supported() -> None:
    assert versions.series(versions.installed()) in versions.SUPPORTED
    versions.check()


@pytest.mark.parametrize("release", ["0.25.1", "0.28.0", "0.34.0", "1.0", "dev"])
def test_other_versions_do_not_start(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(versions.OVERRIDE, raising=False)
    monkeypatch.setattr(versions, "_distribution", lambda name: "")
    monkeypatch.setattr("vllm.__version__", release)
    with pytest.raises(
        CompatibilityError, match="supports vLLM 0.26, 0.30, 0.31, 0.32, 0.33.*or set VLLM_STEER_"
    ):
        register()


def test_the_override_warns_and_still_checks_the_symbols(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(versions.OVERRIDE, "1")
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        register()
    assert "vLLM 0.34.0 is not supported" in caplog.text


@pytest.mark.parametrize("release", ["0.26.0", "0.32.1", "0.33.0+cu130", "0.31.0rc1"])
def test_releases_of_a_supported_series_start(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.__version__", release)
    versions.check()


def test_an_unbuilt_checkout_is_asked_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "dev")
    assert versions.series(versions.installed()) in versions.SUPPORTED


def test_the_documentation_shows_the_versions() -> None:
    rows = [f"| {release} | {how} |" for release, how in versions.CHECKED.items()]
    assert "\n".join(rows) in PAGE.read_text()
