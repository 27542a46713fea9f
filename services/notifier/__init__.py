"""The worker that tells the outside world how jobs ended."""
