"""What every room may use: errors, files, logging, processes, provenance. Imports nothing of the package."""
