"""Runs the VM's main function with a fake."""

import signal
from pathlib import Path

from vm import __main__ as vm
from vm import accel, cards, ending, kernels, root

# Whoever runs the tests may ignore them, and that is inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
root.image = lambda: Path("/root.squashfs")
root._is_guests_python = lambda: True  # type: ignore[assignment] # or it is said that it is not
accel.why_not = lambda *_: ""
cards.can_wire = lambda: False  # type: ignore[assignment]
kernels.find = lambda wanted: kernels.Kernel(wanted, Path("/bin/true"))
raise SystemExit(ending.run(vm.main, "vm"))
