"""What keeps a run alive or ends it well: signals, hangs, bad losses, restarts."""
