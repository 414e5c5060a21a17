"""From a manifest to shards: audit, findings, encoding, packing, counts, proof."""
