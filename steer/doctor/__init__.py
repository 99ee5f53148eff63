"""What this machine can do for a service, what is missing, and how to get it.

`look` asks the system; the checks judge what it saw and are pure.
"""
