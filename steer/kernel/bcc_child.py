"""Compile one policy with bcc: run by a Python that has it, never imported.

    python3 bcc_child.py SOURCE INCLUDE_DIR

Writes to standard output, as JSON, the compiler's version and the bytecode of
each program in hexadecimal; the compiler's messages go to standard error. Exit
status 3: this Python has no bcc. No maps are made and nothing is loaded, so no
privilege is needed.

Stands alone, as the system's Python that runs it may not have steer.
"""

import json
import os
import sys

PROGRAMS = ("plain", "migrate")
NO_BCC = 3


def main(source: str, include: str) -> int:
    # bcc takes "kernel headers" from here: the few of our own, so none have to be installed.
    os.environ["BCC_KERNEL_SOURCE"] = include
    try:
        import bcc
        from bcc import BPF
    except ImportError as error:
        print(error, file=sys.stderr)
        return NO_BCC
    if not hasattr(BPF, "dump_func"):
        print("this bcc is not the BPF Compiler Collection", file=sys.stderr)
        return NO_BCC
    try:
        module = BPF(src_file=source.encode(), cflags=[f"-I{include}", "-Wno-unused-function"])
    except Exception as error:  # noqa: BLE001 - bcc raises nothing more exact
        print(error, file=sys.stderr)
        return 1
    programs = {name: module.dump_func(f"steer_{name}".encode()).hex() for name in PROGRAMS}
    json.dump({"compiler": f"bcc {bcc.__version__}", "programs": programs}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
