"""Which modules are imported before the first worker."""

import sys

from steer import __main__
from steer.linux import unix

looks: list[object] = []
may_listen = unix.may_listen


def looked(*given):
    looks.append(given)
    return may_listen(*given)


unix.may_listen = looked
sys.argv = ["steer", "run", "--demo", "--pid", "/no/such/directory/file"]
try:
    __main__.main()
except SystemExit:
    print(len(looks))
