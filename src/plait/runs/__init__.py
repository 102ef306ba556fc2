"""A whole run: recipe, units of work, waves, executors, and the single stages of the command line."""
