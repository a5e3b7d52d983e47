"""Collectives over one axis of the layout, each counted in a ledger by axis and operation."""
