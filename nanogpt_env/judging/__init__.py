"""What machines can say about a candidate before it runs."""
