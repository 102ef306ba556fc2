"""`merge auto`: which merges are tried, which of them is taken, and what it becomes before it is written."""
