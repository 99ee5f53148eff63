"""Compiles policies, loads, verifies and measures programs, and probes the kernel.

No other folder calls libbpf or bcc.
"""
