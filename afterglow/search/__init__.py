"""File search: what is found in vector stores, and in which order."""
