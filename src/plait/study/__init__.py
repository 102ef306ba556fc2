"""Arms x merges x seeds with controls: expanded into jobs, run anywhere, reduced to tables by a fixed protocol."""
