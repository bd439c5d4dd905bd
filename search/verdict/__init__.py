"""Which configuration wins: the leaders of a search, trained again with other seeds and splits, raced and judged."""
