"""The training loop and what a process needs around it."""
