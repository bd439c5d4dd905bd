"""How good captions are: tokens, BLEU, ROUGE-L and CIDEr-D, and whether two candidates differ."""
