"""The backends `ebpf`, `cbpf` and `kernel`, and in `base` the protocol that they implement.

A backend is told which sockets join and leave a group and which workers may be selected. It does
not deal with processes.
"""
