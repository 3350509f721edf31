"""The engine of stampline: everything that is not an agent, a table or a projection."""
