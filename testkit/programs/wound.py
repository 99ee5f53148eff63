"""Runs steer with some of its constants changed."""

import importlib
import sys
from ast import literal_eval

count = int(sys.argv[1])
for each in sys.argv[2 : 2 + count]:
    (where, _, value) = each.partition("=")
    (module, _, name) = where.rpartition(".")
    there = importlib.import_module(module)
    assert hasattr(there, name), where
    setattr(there, name, literal_eval(value))
sys.argv = sys.argv[2 + count :]
from steer.__main__ import main  # noqa: E402 - with the constants as they are now

main()
