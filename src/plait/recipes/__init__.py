"""What a recipe may say, read and checked: all that is wrong with it at once, before anything is run."""
