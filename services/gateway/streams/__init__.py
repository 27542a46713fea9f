"""StreamStatus: the watched jobs, their feeds, and the places of their readers."""
