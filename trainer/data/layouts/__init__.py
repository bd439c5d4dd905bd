"""Layouts of captioned images: one reader each, recognised by what is in the caption file, not by its name."""
