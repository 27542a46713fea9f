"""Measures the costs of the suite: each script prints one JSON object."""
