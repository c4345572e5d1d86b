"""What a gain is held against: matched arms, spliced thoughts, placebos, benchmarks."""
