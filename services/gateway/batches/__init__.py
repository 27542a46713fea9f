"""Batches: BatchService, and the activities of a batch's workflow that are not a GPU worker's."""
