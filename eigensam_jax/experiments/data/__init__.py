"""Data sets: readers, checks and augmentation."""
