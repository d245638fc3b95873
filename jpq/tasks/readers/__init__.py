"""Readers of data that are not images in class folders: each module turns a path into a `jpq.tasks.datasets.Source`."""
