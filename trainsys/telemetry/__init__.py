"""What a run records about itself, who shows it, and how it is read back. Imports no torch."""
