"""The worker that runs a model's jobs on a GPU or CPU."""
