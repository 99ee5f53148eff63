"""Sockets of a reuseport group: made, looked at, repaired, their queues moved.

Nothing here knows of workers' states or of policies.
"""
