"""Floor 1: graphs, and what is true about them. Changes nothing on its own."""
