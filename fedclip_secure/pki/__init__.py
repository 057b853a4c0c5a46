"""Keys, certificates, invitations, and the roster that a person has compared."""
