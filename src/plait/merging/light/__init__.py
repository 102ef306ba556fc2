"""Weighted sums without torch: read, added, rounded, written, and read again."""
