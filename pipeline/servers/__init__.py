"""The servers that stampline can start by itself: two brokers and a database."""
