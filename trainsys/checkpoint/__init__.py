"""Checkpoints that any layout can read: format and commit protocol without torch, saving and loading with it."""
