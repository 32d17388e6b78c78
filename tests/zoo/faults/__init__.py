"""The faults, by where they are injected and what they break."""
