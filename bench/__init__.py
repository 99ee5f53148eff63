"""What steer costs, as figures and ratios of one run. See docs/BENCH.md."""
