"""What runs inside the wall. Standard library only: nothing else of the server can be seen from there."""
