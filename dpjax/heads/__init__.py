"""Heads trained on cached features."""
