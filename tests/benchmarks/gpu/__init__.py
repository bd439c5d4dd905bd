"""The check of the product on a GPU, at the real size: `make gpu-check`."""
