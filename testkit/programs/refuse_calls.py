"""Runs a command to which the kernel refuses some calls."""

import ctypes
import os
import struct
import sys

calls, action, command = sys.argv[1].split(","), int(sys.argv[2]), sys.argv[3:]
ALLOW = 0x7FFF0000
code = [(0x20, 0, 0, 0)]  # the number
for number in calls:
    code += [(0x15, 0, 1, int(number)), (0x06, 0, 0, action)]
code += [(0x06, 0, 0, ALLOW)]
insns = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in code))
program = ctypes.create_string_buffer(struct.pack("=HxxxxxxQ", len(code), ctypes.addressof(insns)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP
os.execvp(command[0], command)
