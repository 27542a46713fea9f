"""The live feed of a job: the seam, its writer, and each of its implementations."""
