"""What an organisation has spent of its units' privacy, and what it lets a run spend."""
