"""The worker that prepares data sets, trains models on them and registers the models."""
