"""Waking the workers. What is queued is in the runs table."""
