"""Draw images: load and merge models, sample with a seed each, guide, make grids."""
