"""The engines: their Protocol, and each of its implementations."""
