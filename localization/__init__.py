"""Camera poses of query images from posed index images: one stage a file, plain tensors in and out."""
