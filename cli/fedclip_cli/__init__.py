"""The two programs: parse, call the library, print."""
