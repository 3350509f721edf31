"""Pure reducers, and the changelog-backed tables they are bound to."""
