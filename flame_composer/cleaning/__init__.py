"""Filters and deduplication of documents, by datatrove, in stages that can be stopped and gone
on with.
"""
