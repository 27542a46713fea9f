"""The engines: the seam, and each of its implementations."""
