"""A silo's privacy report: what it holds, and how it is made of facts."""
