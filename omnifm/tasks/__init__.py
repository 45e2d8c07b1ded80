"""Tasks: everything that differs between classification and, say, segmentation."""
