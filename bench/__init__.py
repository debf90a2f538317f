"""Benchmarks: the same work for the agent and for a floor, in the same run, so that ratios can be compared."""
