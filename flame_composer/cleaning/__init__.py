"""Filtering and deduplication of documents, by datatrove, in stages that can be resumed."""
