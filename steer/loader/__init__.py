"""From C to the kernel: compile, load, verify, probe and measure.

The only door to libbpf and bcc.
"""
