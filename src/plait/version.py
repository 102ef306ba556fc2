"""The version that every record names."""

__version__ = "0.1.0"
