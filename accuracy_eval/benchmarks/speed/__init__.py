"""Memory and speed of generation with dense and pruned caches, on the paper's models or any checkpoint."""
