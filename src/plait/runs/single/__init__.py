"""Single stages as they are asked for at the prompt: files and settings in, a file or folder out; no run around them."""
