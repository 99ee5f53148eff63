"""What fails in steer's processes, and how often: for `sitecustomize`."""

import errno
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

where, which, kind, first, last = os.environ["FAILS"].split()
ERRORS = {
    "OSError": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "MemoryError": MemoryError(),
    "ZeroDivisionError": ZeroDivisionError("of nothing"),
    "RuntimeError": RuntimeError("can't start new thread"),
}
calls = 0


def breaks(real):
    def call(*args, **kwargs):
        global calls
        if os.path.exists("armed") and os.getpid() == int(open("armed").read()):  # noqa: SIM115
            calls += 1
            if int(first) <= calls <= int(last):
                open("failed", "w").close()
                raise ERRORS[kind]
        return real(*args, **kwargs)

    return call


class Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != where:
            return None
        sys.meta_path.remove(self)
        spec: Any = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            owner = module
            *path, last_name = which.split(".")
            for part in path:
                owner = getattr(owner, part)
            setattr(owner, last_name, breaks(getattr(owner, last_name)))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
