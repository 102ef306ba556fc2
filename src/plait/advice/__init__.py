"""Whether adapters should be merged at all: what each way would keep, and how alike they are."""
