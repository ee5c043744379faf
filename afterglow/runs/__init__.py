"""What a run is (states, context), how it moves (lifecycle) and what executes it (loop, worker)."""
