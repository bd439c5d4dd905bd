"""From captioned images to batches: rows and splits, images, tokens, vision outputs kept on disk."""
