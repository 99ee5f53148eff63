"""Tests for a machine of 8 CPUs, with NUMA nodes and queues of its own: `./dev vm test`."""
