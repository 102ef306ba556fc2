"""A merge, or an adapter, written into a copy of the base's weights."""
