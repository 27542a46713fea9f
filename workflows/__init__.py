"""What the suite runs in Temporal: deterministic code alone, which any process can replay."""
