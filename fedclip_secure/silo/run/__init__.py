"""What happens at a silo in a run, from the accepted contract to the adapters."""
