"""The machine: files, buckets, processes, devices, flags, what is shown on a terminal."""
