"""The one training loop and its services. Methods are in `diffalign.methods`."""
