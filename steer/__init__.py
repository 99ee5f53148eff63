"""steer: choose, in the kernel, which worker gets the next connection."""

__version__ = "0.1.0"
