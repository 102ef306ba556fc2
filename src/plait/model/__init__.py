"""A base model with adapters on it: loaded whole, identified, taken apart, and run with updates in its modules."""
