"""The HTTP routes: each parses, acts once and shapes the answer."""
