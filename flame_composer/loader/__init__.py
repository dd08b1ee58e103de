"""Loading of datasets' rows: fetched, shuffled, collated, and resumable at any place."""
