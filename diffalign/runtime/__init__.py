"""What every room stands on: files, processes, devices, seeds, hashes, damaged weights."""
