"""Which sockets share a port, who has them, and what decides between them.

`target`, `grouping` and `words` decide and look at nothing; `seeing` and `counting` look.
"""
