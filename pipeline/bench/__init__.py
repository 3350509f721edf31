"""`stampline bench`: measures the chain beside the limit of this machine, on equal events in the same services."""
