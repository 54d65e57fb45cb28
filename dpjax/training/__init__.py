"""A run is executed."""
