"""The live feed of a job: its Protocol, its writer, and each of its implementations."""
