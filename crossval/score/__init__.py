"""Two engines on a text, teacher-forced: perplexity, and the logits that predict every token bit by bit."""
