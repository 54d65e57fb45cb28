"""Devices, processes and disk."""
