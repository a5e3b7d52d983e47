"""The project's own step run without devices: what any rank of any world computes, sends and holds."""
