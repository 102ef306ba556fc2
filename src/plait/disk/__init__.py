"""How results come to rest: files whole or not at all, flushed, locked, listed in a manifest; folders of the hub."""
