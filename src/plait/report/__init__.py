"""What a finished run says: its numbers, its plots and its pages."""
