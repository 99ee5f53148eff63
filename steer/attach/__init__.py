"""Steers listeners and UDP sockets of servers that run already: `steer attach`.

None of the processes here is steer's. They open and close sockets when they like. This folder
finds them, adds them to a backend, and gives them back to the kernel at the end.
"""
