"""ebpf, cbpf and kernel: each carries out a policy, and `base` is their common shape.

A backend is told who joins, leaves and may be selected, and knows nothing of processes.
"""
