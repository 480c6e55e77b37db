"""From records and pages to packed batches: chat, packing, buckets and the input pipeline."""
