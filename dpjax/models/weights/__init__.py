"""Weight files: where they are, how they are read, and how names are translated."""
