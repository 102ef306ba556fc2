"""The merging methods, one file per idea; importing a file registers its methods with `plait.merging.registry`."""
