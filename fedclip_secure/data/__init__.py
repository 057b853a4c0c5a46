"""Images and features of one silo."""
