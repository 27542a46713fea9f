"""Generated from proto/llm.proto by `make generate`: never edited by hand."""
