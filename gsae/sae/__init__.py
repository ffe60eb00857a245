"""Sparse autoencoders: models, training objectives and file formats. No ranks, no files of other stages."""
