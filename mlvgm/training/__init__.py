"""Training: a purifier on anybody's images (`mlvgm train`), and the classifier of road-signs."""
