"""Audio in, tars out: manifests, packing, the stream, and the target cache's file format. Knows no model."""
