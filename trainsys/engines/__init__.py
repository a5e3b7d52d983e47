"""Engines train one step of a run. All speak :class:`trainsys.engines.base.Engine`."""
