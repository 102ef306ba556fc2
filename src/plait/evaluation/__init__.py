"""Scoring adapters and knowing how sure the scores are."""
