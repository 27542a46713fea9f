"""The sinks: the seam, and each of its implementations."""
