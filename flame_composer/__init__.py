"""Text to packed shards, shards to a GLA model: pretraining with fla, Composer and Streaming."""
