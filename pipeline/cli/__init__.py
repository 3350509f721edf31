"""The `stampline` command line."""
