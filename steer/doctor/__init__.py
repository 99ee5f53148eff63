"""What this machine can do for a service, what is missing, and how to get it.

`look` reads the system and probes the kernel. The checks judge the result and are pure.
"""
