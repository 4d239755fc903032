"""What serves many requests at once: shared prefixes, their order, and packed passes."""
