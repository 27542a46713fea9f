"""The sinks: their Protocol, and each of its implementations."""
