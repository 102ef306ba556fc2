"""`plait check`: what was written against its manifest, and what other loaders make of it."""
