"""What a base, each adapter and their merge answer to the same prompts, side by side."""
