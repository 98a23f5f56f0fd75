"""Metrics of generated images, one file each. All read features of images; what computes those is `base.ImageFeatures`."""
