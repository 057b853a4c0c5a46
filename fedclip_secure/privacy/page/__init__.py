"""Privacy reports for people: one HTML file each."""
