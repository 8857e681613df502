"""Contrastive and selective hidden embeddings for medical image segmentation."""
