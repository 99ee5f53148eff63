"""What the doctor says before and after its cure."""

import json
import os
import subprocess

from steer.config.service import Service
from steer.doctor import checks as doctor


def told():
    found = doctor.examine(Service(bind=("0.0.0.0:8080",), policy="cpu"))
    return [[e.verdict, e.found, e.cure] for e in found if e.found.startswith("v0:")]


def sh(command):
    subprocess.run(command, shell=True, check=True, stdout=subprocess.DEVNULL)


sh("mount -t sysfs sysfs /sys")
sh("ip link add v0 numrxqueues 2 type veth peer name v1")
sh("ip link set v0 up && ip link set v1 up")
first = min(os.sched_getaffinity(0))
sh(f"echo {1 << first:x} | tee /sys/class/net/v0/queues/rx-*/rps_cpus")
before = told()
sh(before[0][2])
print(json.dumps([before, told()]))
