"""Captions of images by a base with or without an adapter, as Transformers' `generate` makes them."""
