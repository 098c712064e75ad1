"""Token stores: the ids of documents on disk, with their borders and marks."""
