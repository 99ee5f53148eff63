"""Steers listeners of servers that run already: `steer attach`.

None of the processes here is steer's. They open and close listeners when they like. This folder
finds the listeners, adds them to a backend, and gives them back to the kernel at the end.
"""
