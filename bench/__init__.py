"""What the suite costs, measured: each script prints one JSON object."""
