"""The worker pool: processes, their lifecycle, and which of them may be selected.

`lifecycle` is pure and says what follows from what; clocks and processes are around it. `pool`
holds the workers, and `supervision` puts together what looks after them.
"""
