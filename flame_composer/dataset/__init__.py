"""The dataset on disk: writing packed rows into shards, and reading, checking, describing them."""
