"""Kernels to try steer on: booted in a VM, and what was found there. See docs/KERNELS.md."""
