"""The steering configuration of an engine, as it travels in ``additional_config["steering"]``.

vLLM hands ``additional_config`` to every worker and hashes it into the key of its compile cache, so
everything that shapes the traced graph stands here (``GRAPH_FIELDS``): without it a cached graph without
steering would be reused. Importing this module imports neither torch nor vllm.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_steer.errors import ConfigError, choices
from vllm_steer.fields import LayerIndex

CONFIG_KEY = "steering"
# Raised whenever the traced addition changes, so that no graph of another form is reused.
GRAPH_REVISION = 5
# What of the resolved configuration shapes the traced graph or the memory that a worker takes.
GRAPH_FIELDS = ("rows", "layers", "ops", "rank", "version", "graph_revision")
# The same where requests may read; without that the graph is the one that it would be without these.
READ_FIELDS = ("reads", "read_rows")


class SteeringConfig(BaseModel):
    """What a user gives, by flag or in ``additional_config["steering"]``.

    Attributes:
        packs: The steering packs to load: directories, or hub repositories as ``owner/name`` or
            ``owner/name@revision``.
        rows: Rows of the bank: distinct combinations of directions that one step can hold, and
            one of zeros. Each of ``max_num_seqs`` requests is promised an equal share. None takes
            two for each, enough for one sum in the prompt and another in the answer.
        policy: File with aliases, limits and permissions, ``vllm_steer.serving.policy.Policy``.
        pack_roots: Directories that packs may be loaded from while the server runs.
        layers: Layers to hook; None takes those of the packs.
        ops: ``additive`` compiles the addition alone, ``affine`` every form of
            ``vllm_steer.operations.OPS``.
        upload_mib: Largest body of vectors that a client may send, in MiB; None takes none.
        wait_seconds: For how long a request waits for rows before it is answered with 503.
        upload_total_mib: Most MiB of all vectors that clients have sent and that are served; None takes
            eight of the largest.
        upload_count: Most of them at once.
        rank: ``affine``: components of U·(V·h + b) that a request can use at one layer and
            position; even, since a plane takes two.
        reads: Probes that a request can read; 0 leaves reading out of the graph.
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


class ResolvedConfig(SteeringConfig):
    """The configuration checked against the model, as engine processes get it.

    Attributes:
        packs: Absolute paths.
        rows: Number of rows.
        sums_per_request: Distinct sums of directions that one request may need.
        queued: Whether the front end lets requests wait for rows. Otherwise the rows suffice for any
            ``max_num_seqs`` requests.
        read_rows: Rows of readers, one of zeros among them; enough for any ``max_num_seqs`` requests.
        layers: Layers that are hooked, which must hold those of every pack.
        digests: Digest of each pack's tensor file, so that no process steers with other vectors.
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
    """Version of the installed package."""
    return version("vllm-steer")


def parse_config(value: Any) -> SteeringConfig:
    """Validates what a user wrote.

    Raises:
        ConfigError: It is malformed; the message names the field and what would be right.
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
