"""steer: choose, in the kernel, which worker gets the next connection.

Names are imported when they are first used (PEP 562), so `import steer` costs next to nothing.
"""

__version__ = "0.1.0"
__all__ = [
    "BindError",
    "ConfigError",
    "GroupError",
    "KernelError",
    "ReuseportGroup",
    "SlotCounts",
    "SteerError",
    "__version__",
]

TYPE_CHECKING = False  # that of typing costs its import
if TYPE_CHECKING:
    from steer.errors import BindError, ConfigError, GroupError, KernelError, SteerError
    from steer.group import ReuseportGroup
    from steer.slots import SlotCounts

_MODULES = {"ReuseportGroup": "steer.group", "SlotCounts": "steer.slots"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_MODULES.get(name, "steer.errors"))
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
