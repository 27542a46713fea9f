"""FileService: files whose records are workflows and whose content is in the store."""
