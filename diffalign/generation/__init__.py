"""Draw images: pipelines, one seed per image, guidance, merged models, micro-batches, grids."""
