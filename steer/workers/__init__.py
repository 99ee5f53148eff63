"""The worker pool: processes, their lifecycle, and which of them may be selected.

What follows from what is in `lifecycle`, which is pure; clocks and processes are around it.
"""
