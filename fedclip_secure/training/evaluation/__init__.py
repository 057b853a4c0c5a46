"""How right an adapter is, and what it says of images without labels."""
