"""What a prompt's keys and values look like, and what pruning them does to each layer's attention output."""
