"""Files, processes, devices, seeds, hashes and weight files, for all other packages."""
