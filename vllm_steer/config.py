"""The steering configuration of an engine, passed in ``additional_config["steering"]``.

vLLM passes ``additional_config`` to every worker and hashes it into its compile-cache key, so everything that
shapes the traced graph is here (``GRAPH_FIELDS``); otherwise a cached graph without steering would be reused.
Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from vllm_steer.errors import ConfigError, choices
from vllm_steer.fields import LayerIndex

CONFIG_KEY = "steering"
# Incremented whenever the traced addition changes, so that no outdated graph is reused.
GRAPH_REVISION = 6
# Fields of the resolved configuration that shape the traced graph or a worker's memory.
GRAPH_FIELDS = ("rows", "layers", "ops", "rank", "multiply", "version", "graph_revision")
# Further fields where requests may read; otherwise they do not change the graph.
READ_FIELDS = ("reads", "read_rows")


class SteeringConfig(BaseModel):
    """The user's configuration, from flags or ``additional_config["steering"]``.

    Attributes:
        packs: The steering packs to load: directories, or hub repositories as ``owner/name`` or
            ``owner/name@revision``.
        rows: Rows of the bank: distinct combinations of directions that one step can hold, plus one of zeros.
            Each of ``max_num_seqs`` requests is guaranteed an equal share. None takes two per request, enough
            for one sum in the prompt and another in the answer.
        policy: File with aliases, limits and permissions, ``vllm_steer.serving.policy.Policy``.
        pack_roots: Directories that packs may be loaded from while the server runs.
        layers: Layers to hook; None takes those of the packs.
        ops: ``additive`` compiles only the addition, ``affine`` every form of
            ``vllm_steer.operations.OPS`` but ``multiply``.
        multiply: ``affine``: whether op ``multiply`` is compiled too.
        upload_mib: Largest body of vectors that a client may send, in MiB; None accepts no uploads.
        wait_seconds: How long a request waits for rows before it is answered with 503.
        upload_total_mib: Largest total of all served uploads, in MiB; None takes eight times ``upload_mib``.
        upload_count: Largest number of uploads served at once.
        rank: ``affine``: components of U·(V·h + b) that a request can use at one layer and
            position; even, since a plane takes two.
        reads: Probes that a request can read; 0 leaves reading out of the graph.
        playground: Whether ``vllm serve`` has the playground, a web page under ``/steering``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    packs: Annotated[list[str], Field(min_length=1)]
    rows: Annotated[int, Field(ge=2)] | None = None
    policy: str | None = None
    pack_roots: Annotated[list[str], Field(min_length=1)] | None = None
    layers: Annotated[list[LayerIndex], Field(min_length=1)] | None = None
    ops: Literal["additive", "affine"] = "additive"
    upload_mib: Annotated[int, Field(ge=1, le=8192)] | None = None
    wait_seconds: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = 60.0
    upload_total_mib: Annotated[int, Field(ge=1, le=2**20)] | None = None
    upload_count: Annotated[int, Field(ge=1, le=2**16)] = 64
    rank: Annotated[int, Field(ge=2, le=64, multiple_of=2)] = 2
    reads: Annotated[int, Field(ge=0, le=16)] = 0
    multiply: bool = False
    playground: bool = False

    @model_validator(mode="after")
    def _multiplies_in_affine_rows(self) -> SteeringConfig:
        if self.multiply and self.ops != "affine":
            raise PydanticCustomError("multiply", "multiply needs ops 'affine' too")
        return self


class ResolvedConfig(SteeringConfig):
    """The configuration checked against the model, as engine processes get it.

    Attributes:
        packs: Absolute paths.
        rows: Number of rows.
        sums_per_request: Distinct sums of directions that one request may need.
        queued: Whether requests wait for rows in the front end. Otherwise the rows suffice for any
            ``max_num_seqs`` requests.
        read_rows: Rows of readers, including one of zeros; enough for any ``max_num_seqs`` requests.
        layers: Hooked layers, which must include those of every pack.
        digests: Digest of each pack's tensor file, so that all processes steer with the same vectors.
        version: Version of vllm-steer.
        graph_revision: Revision of the traced addition.
    """

    rows: Annotated[int, Field(ge=2)]
    sums_per_request: Annotated[int, Field(ge=1)]
    queued: bool
    read_rows: Annotated[int, Field(ge=1)] = 1
    layers: Annotated[list[LayerIndex], Field(min_length=1)]
    digests: list[str]
    version: str
    graph_revision: int


def plugin_version() -> str:
    """The version of the installed package."""
    return version("vllm-steer")


def parse_config(value: Any) -> SteeringConfig:
    """Validates a user's configuration.

    Raises:
        ConfigError: It is malformed; the message names the field and what would be valid.
    """
    try:
        return SteeringConfig.model_validate(value)
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            where = ".".join(["additional_config", CONFIG_KEY, *map(str, fault["loc"])])
            hint = (
                f"; {choices(str(fault['loc'][-1]), SteeringConfig.model_fields)}"
                if (fault["type"] == "extra_forbidden")
                else ""
            )
            faults.append(f"{where}: {fault['msg']}{hint}")
        raise ConfigError("; ".join(faults)) from error


def resolved_config(additional_config: Any) -> ResolvedConfig | None:
    """Returns the steering configuration of an engine, or None when steering is off.

    Args:
        additional_config: ``VllmConfig.additional_config``.

    Raises:
        ConfigError: The engine was configured by another version of vllm-steer.
    """
    if not isinstance(additional_config, Mapping) or CONFIG_KEY not in additional_config:
        return None
    try:
        config = ResolvedConfig.model_validate(additional_config[CONFIG_KEY])
    except ValidationError as error:
        raise ConfigError(
            f"the engine's steering configuration was not made by this vllm-steer {plugin_version()} "
            f"({error.errors()[0]['msg']}); install the same version everywhere"
        ) from error
    if (config.version, config.graph_revision) != (plugin_version(), GRAPH_REVISION):
        raise ConfigError(
            f"the engine was configured by vllm-steer {config.version}, this process has {plugin_version()}; "
            f"install the same version everywhere"
        )
    return config
