"""The file that travels with a MoE checkpoint, so that other libraries can load it."""
