"""Text first: what the text of a broken engine looks like, and which faults make engines print such texts."""
