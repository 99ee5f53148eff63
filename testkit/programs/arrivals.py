"""On which CPUs packets arrive."""

import json
import os
import socket
import subprocess

from steer.linux import nic

SO_INCOMING_CPU = 49
client_cpu, steered_cpu = sorted(os.sched_getaffinity(0))[:2]


def arrival(server):
    with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted:
        client.send(b"x")
        accepted.recv(1)
        return accepted.getsockopt(socket.SOL_SOCKET, SO_INCOMING_CPU)


def told():
    (lo,) = nic.receive_queues()
    return sorted(nic.cpus_taking_packets(lo) or ())


subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
os.sched_setaffinity(0, {client_cpu})
with socket.create_server(("127.0.0.1", 0)) as server:
    unsteered = told(), arrival(server)
    with open("/sys/class/net/lo/queues/rx-0/rps_cpus", "w") as mask:
        mask.write(f"{1 << steered_cpu:x}")
    steered = told(), arrival(server)
print(json.dumps([client_cpu, steered_cpu, unsteered, steered]))
