"""From a file's bytes to chunks. Documents are hostile until read: `parse.py` has them read in a child process."""
