"""Where the time goes: kernels timed inside whole graphs, kept in a table, and predicted from it."""
