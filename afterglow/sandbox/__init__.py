"""The code interpreter's engines: where model-written Python runs, walled off, or does not run at all."""
