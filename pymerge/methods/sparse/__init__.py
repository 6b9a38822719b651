"""Sparse task vectors: DARE, breadcrumbs, DELLA."""
