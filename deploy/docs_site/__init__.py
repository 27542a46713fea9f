"""`make docs`: builds the documentation as a site, for people and for language models."""
