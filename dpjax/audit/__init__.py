"""Attacks on the guarantee of a run, with canaries among its examples."""
