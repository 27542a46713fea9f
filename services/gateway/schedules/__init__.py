"""Schedules: the calls of their service, and the jobs that they start."""
