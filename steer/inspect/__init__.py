"""Which sockets share a port, who holds them, and what decides between them.

Only `seeing`, `counting` and `inspection` look at the machine; the other modules are pure.
"""
