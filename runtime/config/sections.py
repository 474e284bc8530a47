"""The sections of `sage_llm.yaml`, with the defaults of every field."""

from attrs import field, frozen, validators

from sagellm_ir.located_yaml import one_of
from sagellm_ir.runtime.accel.config import AccelConfig
from sagellm_ir.runtime.ports import recommended_llm_port
from sagellm_ir.runtime.protocols.capability import DOMESTIC
from sagellm_ir.runtime.protocols.kv_config import KVSchemaConfig

__all__ = [
    "FROM_PORTS",
    "SECRET",
    "CommConfig",
    "ControlPlaneConfig",
    "EngineConfig",
    "LimitsConfig",
    "PatchesConfig",
    "SageConfig",
    "ServerConfig",
]

SECRET = {"secret": True}
"""Metadata of a field that is never printed."""
FROM_PORTS = {"from_ports": True}
"""Metadata of a field whose default is a port of SAGE's table."""

_PORT = validators.and_(validators.ge(0), validators.le(65535))


@frozen
class EngineConfig:
    """Which engine is started, with which model."""

    id: str = "sagellm-0"
    """Its name at the control plane; unique there."""
    backend: str = "embedded"
    """A kind of `sagellm-ir backend list`."""
    model: str = "smollm2-135m"
    """A known name, a model folder or a file, as the backend takes it."""
    dtype: str = "float32"
    """Of weights and activations."""
    device: str = "cpu"
    """Where it runs, as torch names devices."""
    target: str = "cpu"
    """What plans are compiled for: a preset or a YAML file."""
    pipeline: str = "O2"
    """Passes that requests go through: a preset or a pipeline text."""


@frozen
class PatchesConfig:
    """LMDeploy's sources and our patches to them."""

    target: str | None = None
    """The tree that `sagellm-ir patches` works on: a folder that holds `lmdeploy/`, or `installed`;
    null: the submodule when it is checked out, else the pinned wheel in `build/lmdeploy`."""


@frozen
class CommConfig:
    """Collectives between the ranks of an engine."""

    backend: str = field(default="auto", validator=one_of(("auto", "gloo", "nccl")))
    """`auto`: nccl on CUDA, gloo elsewhere."""
    timeout: float = field(default=300.0, validator=validators.gt(0))
    """Seconds until a collective that some rank does not join fails."""
    interface: str | None = None
    """The network interface that ranks find each other on; null: the system's choice."""


@frozen
class ControlPlaneConfig:
    """How an engine joins a control plane."""

    attach: bool = False
    """Whether a server registers its engine with the gateway when it starts."""
    gateway: str | None = None
    """The gateway's address; null: this machine's, on the port of SAGE's table."""
    instance_type: str = field(
        default="general", validator=one_of(("general", "prefilling", "decoding"))
    )
    """The part of the work that the engine takes."""
    heartbeat: float = field(default=10.0, validator=validators.gt(0))
    """Seconds between two reports of load."""
    policy: str = field(
        default="fifo", validator=one_of(("fifo", "priority", "slo_aware", "adaptive"))
    )
    """The order in which the control plane takes requests."""
    prefer: tuple[str, ...] = field(
        default=(), validator=validators.deep_iterable(one_of(DOMESTIC))
    )
    """Accelerators whose engines are taken first."""


@frozen
class ServerConfig:
    """The HTTP server of an engine."""

    host: str = "127.0.0.1"
    """The address to listen on; `0.0.0.0`: on all of the machine's."""
    port: int = field(factory=recommended_llm_port, validator=_PORT, metadata=FROM_PORTS)
    """0: any free one."""
    api_keys: tuple[str, ...] = field(default=(), repr=False, metadata=SECRET)
    """Who may ask; none: everybody who reaches the address."""


@frozen
class LimitsConfig:
    """What one server takes on."""

    body_bytes: int = field(default=8 << 20, validator=validators.gt(0))
    """Bytes of one request's body, at most."""
    prompt_tokens: int | None = field(default=None, validator=validators.optional(validators.gt(0)))
    """Tokens of one prompt, at most; null: as many as the engine can hold."""
    new_tokens: int = field(default=4096, validator=validators.gt(0))
    """Tokens of one answer, at most."""
    waiting: int = field(default=256, validator=validators.gt(0))
    """Requests that wait or run at once; more are told to come back."""
    drain_seconds: float = field(default=30.0, validator=validators.ge(0))
    """How long a server that is told to stop lets requests finish."""


@frozen
class SageConfig:
    """The configuration of one server: all sections of `sage_llm.yaml`."""

    engine: EngineConfig = field(factory=EngineConfig)
    """Which engine, with which model."""
    patches: PatchesConfig = field(factory=PatchesConfig)
    """LMDeploy's sources."""
    kv_schema: KVSchemaConfig = field(factory=KVSchemaConfig)
    """How KV is stored."""
    comm: CommConfig = field(factory=CommConfig)
    """Collectives."""
    accel: AccelConfig = field(factory=AccelConfig)
    """Attention on a GPU."""
    control_plane: ControlPlaneConfig = field(factory=ControlPlaneConfig)
    """How the engine joins a control plane."""
    server: ServerConfig = field(factory=ServerConfig)
    """The HTTP server."""
    limits: LimitsConfig = field(factory=LimitsConfig)
    """What it takes on."""
