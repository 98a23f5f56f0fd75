"""Data of one's own: prompts and captioned images, read through Ray Data, kept by content, checked row by row."""
