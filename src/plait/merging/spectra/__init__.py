"""Singular vectors of deltas that are never formed: from small matrices of their factors."""
