"""Rows of datasets in an order that can be resumed anywhere, fetched, shuffled and collated."""
