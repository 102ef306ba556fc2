"""A result on the Hugging Face hub: what goes there, and sending it."""
