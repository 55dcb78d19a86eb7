"""From weights to images: which labels, drawing, decoding, writing."""
