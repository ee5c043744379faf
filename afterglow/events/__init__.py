"""Live delivery of run events to those who follow them."""
