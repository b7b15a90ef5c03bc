"""Dev queries measured while training."""
