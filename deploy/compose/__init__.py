"""The suite on one machine, by Docker Compose."""
