"""Two tokenizers over one vocabulary: equal ids for every text of a corpus, pieces that give it back."""
