"""What steer needs of Linux beside sockets and BPF: processes, /proc, signals, descriptors, CPUs.

Nothing here knows of backends or workers' states.
"""
