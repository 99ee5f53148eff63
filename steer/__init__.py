"""steer: select, in the kernel, which worker gets the next connection.

Names are imported when they are first used (PEP 562), so `import steer` costs next to nothing.
"""

__version__ = "0.1.0"
__all__ = [
    "AppLoadError",
    "BindError",
    "CompileError",
    "Config",
    "ConfigError",
    "ControlError",
    "GroupError",
    "KernelError",
    "NotRunning",
    "Orphaned",
    "Refused",
    "ReuseportGroup",
    "Service",
    "ServiceConnection",
    "SlotCounts",
    "SteerError",
    "VerifierError",
    "Worker",
    "WorkersFailed",
    "__version__",
    "connect",
    "run",
]

TYPE_CHECKING = False  # that of typing costs its import
if TYPE_CHECKING:
    from steer.api.connection import ServiceConnection, connect
    from steer.api.group import ReuseportGroup
    from steer.api.service import Config, Service, run
    from steer.api.slots import SlotCounts
    from steer.child.api import Worker
    from steer.errors import (
        AppLoadError,
        BindError,
        CompileError,
        ConfigError,
        ControlError,
        GroupError,
        KernelError,
        NotRunning,
        Orphaned,
        Refused,
        SteerError,
        VerifierError,
        WorkersFailed,
    )

_MODULES = {
    "Config": "steer.api.service",
    "ReuseportGroup": "steer.api.group",
    "Service": "steer.api.service",
    "ServiceConnection": "steer.api.connection",
    "SlotCounts": "steer.api.slots",
    "Worker": "steer.child.api",
    "connect": "steer.api.connection",
    "run": "steer.api.service",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_MODULES.get(name, "steer.errors"))
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
