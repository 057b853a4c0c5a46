"""What a stranger can check of privacy reports."""
