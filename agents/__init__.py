"""The roles of stampline: each agent receives a batch, calls pure code, and writes."""
