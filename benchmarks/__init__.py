"""The numbers that the README quotes, one command each: `python -m benchmarks.<name>`; `make bench` runs all."""
