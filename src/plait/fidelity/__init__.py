"""How close a merge stays to each of its adapters, without labels."""
