"""The worker that notifies receivers of jobs' events."""
