"""One family of networks a file, with the names of its published weights."""
