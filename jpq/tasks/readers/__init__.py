"""Readers of data: each module turns a path into a `jpq.tasks.datasets.Source`."""
