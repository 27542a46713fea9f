"""Installs, runs and documents the suite."""
