"""PipelineService: pipelines from their submission to their last message. Their code is in the package pipelines."""
