"""``diffalign demo``: models side by side from the same noise, blind votes that can be trained on, steering to watch."""
