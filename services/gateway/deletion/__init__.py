"""Deletion of jobs, of what belongs to them, and of all that a user owns."""
