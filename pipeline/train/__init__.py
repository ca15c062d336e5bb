"""One process that trains: backbone resident, trials coming and going."""
