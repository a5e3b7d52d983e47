"""What this machine can do at most: the ceilings that plans and MFU are held against. Imports torch."""
