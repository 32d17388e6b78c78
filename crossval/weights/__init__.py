"""Is a model file what its checkpoint says? Every tensor and key compared, before anything is computed with it."""
