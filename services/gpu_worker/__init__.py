"""The worker that runs the model."""
