"""What comes from other people, looked at before it is believed: values by type and range, names by pattern."""
