"""The runtime: rows, pages, families, the pass and generation."""
