"""Make it real."""
