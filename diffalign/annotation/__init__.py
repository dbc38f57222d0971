"""Make preference data: draw images, score them, write pairs and lists, recaption."""
